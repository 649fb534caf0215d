"""bitsandbytes: LLM.int8() and the 4-bit types nf4 and fp4, made from the checkpoint as it loads or loaded as saved."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import replace
from typing import Any

from comparator.backends import dtypes, sizes, transformers_loader
from comparator.backends import ready_made as sources
from comparator.backends.base import (
    AdapterKind,
    LoadedModel,
    Logical,
    Method,
    Placement,
    Progress,
    QuantizedType,
    Training,
)
from comparator.backends.bnb import limits, outliers, ready_made, stored
from comparator.backends.bnb.ready_made import HEADS
from comparator.backends.bnb.settings import FOUR_BIT, INT8
from comparator.backends.options import ONLY
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint
from comparator.util.compat import bitsandbytes as compat


class BitsAndBytes(sources.FromCheckpoint):
    name = "bitsandbytes"
    requires = ("torch", "transformers", "bitsandbytes")
    libraries = ("bitsandbytes",)
    loaded_by = ("transformers", "vLLM")
    # `bitsandbytes.autograd._functions` logs "inputs will be cast" once per layer and token.
    loggers = (
        "bitsandbytes",
        "bitsandbytes.autograd._functions",
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.backends.utils",
    )
    types = (
        QuantizedType("int8", 8, "8-bit integers, one scale per row"),
        QuantizedType("nf4", 4),
        QuantizedType("fp4", 4),
    )
    reads = ("bitsandbytes",)
    decided = ("compute", "dq", "dtype", "skip", "storage", "threshold")
    overridable = ("compute",)
    methods = (
        Method("int8", "LLM.int8", "1 byte per weight, one scale per row; outlier features in 16 bits. Made as it loads, or "
               "saved before: int8@user/repo.", INT8, takes_source=True, precision=50, bits=8,
               decode=("slower", "slower")),
        Method("nf4", "4-bit NormalFloat", "Two 4-bit values in each byte; 16 levels spaced for normally "
               "distributed weights; one scale per 64 weights. Made as it loads, or saved before: nf4@user/repo.",
               FOUR_BIT, takes_source=True, precision=30, bits=4, presets=("nf4", "nf4:dq"),
               decode=("faster", "faster")),
        Method("fp4", "4-bit float", "Two 4-bit values in each byte; the 16 levels are tiny floats; one scale per "
               "64 weights. Made as it loads, or saved before: fp4@user/repo.", FOUR_BIT, takes_source=True,
               precision=20, bits=4, decode=("", "faster")),
    )  # fmt: skip

    # ------------------------------------------------------------ checkpoints as they were saved

    def readers(self, quantization) -> list[str]:
        method = ready_made.method_of(quantization)
        return [method] if method and super().readers(quantization) else []

    def decode_speed(self, variant: Variant, cuda: bool) -> str:
        """Without its outlier threshold int8 skips half of its kernels."""
        if variant.method == "int8" and float(self.values(variant)["threshold"]) == 0:
            return "similar" if cuda else ""
        return super().decode_speed(variant, cuda)

    def complete_on_the_spot(self, variant, checkpoint, progress=None):
        return variant

    def check_source(self, checkpoint):
        ready_made.check(checkpoint)

    def settings(self, checkpoint, variant):
        return ready_made.options(checkpoint, self.requested(variant).get("skip"))

    def _load_ready(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> Any:
        """(model, notes) of a checkpoint that is quantized already."""
        opened = self.opened(variant)
        own, asked = ready_made.options(opened), self.requested(variant)
        arguments = {}
        if "compute" in asked and asked["compute"] != own["compute"]:
            arguments["config"] = _with_compute(opened, asked["compute"])
        _require_bf16(variant, {**own, **asked}, placement)
        model = self.load_opened(variant, placement, progress, dtype=own["dtype"] or "bf16", **arguments)
        if lost := compat.without_state(model):
            raise UserError(
                f"transformers found no packed weight for {lost[0]} ({len(lost)} in all) in {opened.source}.",
                "Its llm_int8_skip_modules names these modules differently from this version of transformers: correct it "
                "in its config.json.",
            )
        compat.own_packed(model)
        notes = sources.tokenizer_note(opened, checkpoint) + sources.left_over_note(opened)
        return model, notes + ready_made.skip_note(opened)

    # ------------------------------------------------------------ loading

    def describe(self, variant: Variant) -> str:
        return super().describe(variant).replace("dq true", "double quantized")

    def tensor_sizes(self, variant, checkpoint, device=""):
        values = self.values(variant)
        if variant.source:
            dtype = self.requested(variant).get("dtype")
            return stored.of_checkpoint(self.opened(variant), variant.method, dtype, device)
        left, _ = _left(values["skip"], *_heads(checkpoint))
        rest, nested = sizes.FLOAT_BYTES[values["dtype"]], values.get("dq") == "true"
        return [
            sizes.plain(tensor, rest)
            if stored.stays(tensor, left)
            else stored.quantized(tensor.name, tensor.shape, variant.method, nested, device)
            for tensor in sizes.held(checkpoint)
        ]

    def workspace_bytes(self, variant, rows, outputs, inputs, device) -> int:
        if variant.method == "int8":
            return rows * (inputs + 6 * outputs)  # the input in 8 bits, the sums in 32 and then in 16
        return 2 * outputs * inputs if device.startswith("cuda") else 0

    def silence(self) -> None:
        warnings.filterwarnings("ignore", message=".*MatMul8bitLt: inputs will be cast.*")

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        four_bit = variant.method != "int8"
        load = self._load_ready if variant.source else self._load_on_the_spot
        model, notes = load(checkpoint, variant, placement, progress)
        if four_bit:
            notes += compat.leave_unsupported_layers(model)
        kernel = "bitsandbytes " + ("Linear4bit" if four_bit else "Linear8bitLt")
        if not any(self.owns(m) for m in model.modules()):
            raise UserError(
                f"{checkpoint.architecture} has no linear layer that bitsandbytes can quantize as {variant.notation}.",
                "Use bf16, or shorten skip=.",
            )
        if not four_bit:
            limits.refuse_many_rows(model, [m for m in model.modules() if self.owns(m)])
        return LoadedModel(model, kernel, notes)

    def save(self, checkpoint, variant, placement, target, progress, change=None):
        super().save(checkpoint, variant, placement, target, progress, change)
        if variant.source and (compute := self.requested(variant).get("compute")):
            ready_made.set_compute(target, dtypes.torch_name(compute).removeprefix("torch."))

    def _load_on_the_spot(
        self, checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> Any:
        """(model, notes) of full precision that is quantized while it loads."""
        from transformers import BitsAndBytesConfig

        values = self.values(variant)
        _require_bf16(variant, values, placement)
        left, unprotected = _left(values["skip"], *_heads(checkpoint))
        config = BitsAndBytesConfig(**self._config(variant, left))
        with compat.int8_on_device() if variant.method == "int8" else contextlib.nullcontext():
            model = transformers_loader.from_pretrained(
                checkpoint, placement, progress, dtype=values["dtype"], quantization_config=config
            )
        notes = transformers_loader.lent_notes(checkpoint)
        if unprotected:
            notes.append(
                f"skip=only: {', '.join(unprotected)} is quantized too, which {variant.method} leaves in 16 bits by default."
            )
        names = [name for name, _ in model.named_modules()]
        asked = set(values["skip"].split("+")) - {"", ONLY}
        if strangers := sorted(s for s in asked if not any(n.startswith(s) or n.endswith(s) for n in names)):
            notes.append(f"skip= names modules that this model does not have: {', '.join(strangers)}.")
        return model, notes

    def _config(self, variant: Variant, left: list[str]) -> dict:
        import torch

        config = self._arguments(self.values(variant), variant.method, left)
        return {k: getattr(torch, v) if k.endswith(("dtype", "storage")) else v for k, v in config.items()}

    def _arguments(self, values: dict[str, str], method: str, left: list[str]) -> dict:
        """Arguments of `BitsAndBytesConfig`, dtypes as torch attribute names. left: the modules to leave unquantized,
        which transformers' own list gives where `skip` names none."""
        arguments: dict = {"load_in_8bit": True} if method == "int8" else {"load_in_4bit": True}
        if method == "int8":
            arguments["llm_int8_threshold"] = float(values["threshold"])
        else:
            arguments["bnb_4bit_quant_type"] = method
            arguments["bnb_4bit_compute_dtype"] = dtypes.torch_name(values["compute"]).removeprefix("torch.")
            if values["dq"] == "true":
                arguments["bnb_4bit_use_double_quant"] = True
            if values["storage"] != "uint8":
                arguments["bnb_4bit_quant_storage"] = dtypes.torch_name(values["storage"]).removeprefix(
                    "torch."
                )
        if values["skip"]:
            arguments["llm_int8_skip_modules"] = left
        return arguments

    def code(self, variant, placement, *, layers=(), kernel=None):
        if variant.source:
            return self._code_ready(variant, layers)
        values = self.values(variant)
        tied = any(row.tied_to for row in layers)
        stored = {row.name.rpartition(".")[0].rpartition(".")[2] for row in layers}
        left, _ = _left(values["skip"], [h for h in HEADS if h in stored] or ["lm_head"], tied)
        written = {
            k: f"torch.{v}" if k.endswith(("dtype", "storage")) else repr(v)
            for k, v in self._arguments(values, variant.method, left).items()
        }
        inner = "".join(f"\n    {k}={v}," for k, v in written.items())
        return (
            ["from transformers import BitsAndBytesConfig"],
            [f"quantization = BitsAndBytesConfig({inner}\n)"],
            [f"dtype={dtypes.torch_name(values['dtype'])}", "quantization_config=quantization"],
        )

    def _code_ready(self, variant: Variant, layers):
        """The checkpoint says how it was quantized; the compute dtype alone may be another."""
        values, asked = self.values(variant), self.requested(variant)
        arguments = [f"dtype={dtypes.torch_name(values['dtype'])}"]
        if "compute" not in asked:
            return [], [], arguments
        revision = f", revision={variant.revision!r}" if variant.revision else ""
        compute = dtypes.torch_name(asked["compute"]).removeprefix("torch.")
        setup = [
            f"config = AutoConfig.from_pretrained({variant.source!r}{revision})",
            f'config.quantization_config["bnb_4bit_compute_dtype"] = {compute!r}',
        ]
        return ["from transformers import AutoConfig"], setup, ["config=config", *arguments]

    def code_after(self, variant, layers):
        def wide(row) -> int:
            """What the packed kernel wants the inputs to be a multiple of: 64, or the weights that share a scale."""
            blocks = next((math.prod(part.shape) for part in row.state if part.name == "absmax"), 0)
            return max(64, math.prod(row.shape) // blocks if blocks else 64)

        four_bit = [
            row
            for row in layers
            if (row.logical_dtype in ("nf4", "fp4") and row.device == "cpu" and len(row.shape) == 2)
        ]
        if not any(row.shape[0] % 32 or row.shape[1] % wide(row) for row in four_bit):
            return []
        multiple = max(map(wide, four_bit))
        return [
            "for module in model.modules():  # shapes that bitsandbytes' packed AVX-512 kernel refuses",
            f'    if hasattr(module, "support_avx512bf16_for_cpu") and (module.out_features % 32 or module.in_features % {multiple}):',
            "        module.support_avx512bf16_for_cpu = False",
        ]

    def quant_state(self, module) -> dict:
        weight = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            tensors = {"absmax": state.absmax, "codebook": state.code}
            if getattr(state, "offset", None) is not None:
                tensors["offset"] = state.offset
            if (nested := getattr(state, "state2", None)) is not None:
                tensors |= {"nested absmax": nested.absmax, "nested codebook": nested.code}
            return {k: v for k, v in tensors.items() if v is not None}
        # bitsandbytes moves SCB from the weight to the module's state at the first forward.
        scb = getattr(weight, "SCB", None)
        if scb is None:
            scb = getattr(getattr(module, "state", None), "SCB", None)
        return {} if scb is None else {"SCB": scb}

    def logical(self, module, parameter) -> Logical | None:
        if (state := getattr(parameter, "quant_state", None)) is not None:
            compute = module.compute_dtype or state.dtype
            return Logical(state.quant_type, tuple(state.shape), dtypes.short_name(compute))
        if type(parameter).__name__ == "Int8Params":
            threshold = module.state.threshold
            return Logical("int8", tuple(parameter.shape), "int8" + (" + fp16 outliers" if threshold else ""))
        return None

    def dequantize(self, module):
        import bitsandbytes.functional as F
        import torch

        weight = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            data = weight.data
            if getattr(state, "packing_format_for_cpu", False):
                return compat.unpack_avx512(data, state)
            return F.dequantize_4bit(data, state).to(torch.float32)
        if scales := self.quant_state(module):
            return F.int8_vectorwise_dequant(weight.data, scales["SCB"]).to(torch.float32)
        return None

    # ------------------------------------------------------------ decoding

    def on_parallel_streams(self, module) -> bool:
        return type(module).__name__ in ("Linear4bit", "Linear8bitLt")

    def capture_forward(self, module, rows=1):
        if type(module).__name__ != "Linear8bitLt" or module.state.threshold <= 0:
            return None
        return lambda x: outliers.product(x, module.state, module.bias)

    def capture_note(self, module) -> str:
        return outliers.NOTE

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        if variant.method != "int8" and adapter.peft_type in ("LOHA", "LOKR"):
            raise UserError(
                f"{adapter.source} is {adapter.kind}, and peft has no {adapter.kind} for 4-bit layers: it would take the "
                "packed bytes for the weights.",
                "Use bf16 or int8 for this adapter, or a LoRA, which every variant takes.",
            )

    def reading_state_dict(self, model):
        return compat.keeping_packed(model)

    def training(self, variant: Variant, device: str) -> Training:
        return Training(
            dtype=self.values(variant)["dtype"],
            adapter_width=2,  # trl casts the adapter of a base loaded in 8 or 4 bits to bf16
            activation_width=2 if device.startswith("cuda") else 4,
            upcast=True,
        )

    def training_bytes(self, variant: Variant, checkpoint) -> int:
        """peft's preparation turns what is not quantized to fp32."""
        others = tuple(o for o in variant.options if o[0] != "dtype")
        return self.needed_bytes(replace(variant, options=(*others, ("dtype", "fp32"))), checkpoint)

    def prepare_for_training(self, model) -> None:
        """bitsandbytes repacks 4-bit weights for a CPU at the first inference, and that layout has no gradients."""
        for module in model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False


def _require_bf16(variant: Variant, values: dict[str, Any], placement: Placement) -> None:
    """Raises `UserError` where the GPU would only imitate it."""
    for name in ("dtype", "compute"):
        if values.get(name) == "bf16" and not dtypes.supports_bf16(placement.device):
            stored = variant.source and name == "dtype"
            raise UserError(
                "This GPU has no bf16.",
                f"{variant.source} is stored in it: use a checkpoint in fp16."
                if stored
                else f"Write {replace(variant, options=()).notation}:{name}=fp16 instead.",
            )


def _with_compute(opened: Checkpoint, compute: str) -> Any:
    """The checkpoint's config with another compute dtype, which only layers that multiply look at."""
    name = dtypes.torch_name(compute).removeprefix("torch.")
    return sources.with_quantization(opened, {**(opened.quantization or {}), "bnb_4bit_compute_dtype": name})


def _heads(checkpoint: Any) -> tuple[list[str], bool]:
    """(names of the output head, whether it shares its weights with the embedding)."""
    stored = {t.name.rpartition(".")[0].rpartition(".")[2] for t in checkpoint.tensors}
    return [head for head in HEADS if head in stored] or ["lm_head"], checkpoint.tied


def _left(skip: str, heads: list[str], tied: bool) -> tuple[list[str], list[str]]:
    """(modules to leave unquantized, heads that `skip=only` leaves to be quantized)."""
    names = set(skip.split("+")) - {""}
    unprotected = [] if ONLY not in names or tied else [h for h in heads if h not in names]
    return sorted(names - {ONLY} | (set(heads) - set(unprotected))), unprotected
