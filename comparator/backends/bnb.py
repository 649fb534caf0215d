"""bitsandbytes: LLM.int8() and the 4-bit types nf4 and fp4, made from the checkpoint as it loads."""

from __future__ import annotations

import contextlib

from comparator.backends import loading
from comparator.backends.base import (
    DTYPES,
    Backend,
    LoadedModel,
    Logical,
    Method,
    Option,
    Placement,
    Progress,
)
from comparator.types import Problem, Variant

_DTYPE = Option(
    "dtype", "dtype of what stays unquantized (embeddings, norms, lm_head) and of the activations", "bf16",
    choices=DTYPES,
)  # fmt: skip
_SKIP = Option(
    "skip",
    "modules to leave unquantized, by name, joined with +; replaces the default list, which is lm_head. "
    "A head that shares its weights with the embedding always stays",
    None,
    kind="names",
)
_INT8 = (
    Option(
        "threshold",
        "outlier threshold: input features with an entry above it are multiplied in 16 bits; 0 turns that off",
        "6",
        kind="number",
        minimum=0,
    ),
    _SKIP,
    _DTYPE,
)
_FOUR_BIT = (
    Option("dq", "double quantization: the absmax values are quantized to 8 bits too", "false", kind="flag",
           form="{name}"),
    Option("compute", "dtype in which a layer multiplies, after unpacking", "bf16", choices=DTYPES,
           transformers_default="fp32"),
    Option("storage", "dtype of the buffer that holds the packed 4-bit values; the bits are the same", "uint8",
           choices=("uint8", *DTYPES)),
    _SKIP,
    _DTYPE,
)  # fmt: skip


class BitsAndBytes(Backend):
    name = "bitsandbytes"
    requires = ("torch", "transformers", "bitsandbytes")
    methods = (
        Method("int8", "LLM.int8", "1 byte a weight, one scale a row; outlier features go in 16 bits.", _INT8,
               precision=50, bits=8),
        Method("nf4", "4-bit NormalFloat", "Two 4-bit values in each byte; 16 levels spaced for normally "
               "distributed weights; one scale per 64 weights.", _FOUR_BIT, precision=30, bits=4,
               presets=("nf4", "nf4:dq")),
        Method("fp4", "4-bit float", "Two 4-bit values in each byte; the 16 levels are tiny floats; one scale per "
               "64 weights.", _FOUR_BIT, precision=20, bits=4),
    )  # fmt: skip

    def needed_bytes(self, variant, checkpoint) -> int:
        values = self.values(variant)
        rest = {"fp32": 4, "fp16": 2, "bf16": 2}[values["dtype"]]
        total = 0.0
        for tensor in checkpoint.tensors:
            if len(tensor.shape) < 2 or _stays(tensor.name, values["skip"], checkpoint.tied):
                total += tensor.parameters * rest
            elif variant.method == "int8":
                total += tensor.parameters + 4 * tensor.shape[0]
            else:
                total += tensor.parameters * (0.5 + (0.0165 if values["dq"] == "true" else 0.0625))
        return int(total)

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        from transformers import BitsAndBytesConfig

        loading.quiet_bitsandbytes()
        values, four_bit = self.values(variant), variant.method != "int8"
        for name in ("dtype", "compute"):
            if values.get(name) == "bf16" and not loading.supports_bf16(placement.device):
                raise Problem("This GPU has no bf16.", f"Write {variant.method}:{name}=fp16 instead.")
        config = BitsAndBytesConfig(**self._config(variant, checkpoint.tied))
        with contextlib.nullcontext() if four_bit else loading.int8_on_device():
            model = loading.from_pretrained(
                checkpoint, placement, progress, dtype=values["dtype"], quantization_config=config
            )
        notes = loading.lent_notes(checkpoint) + loading.unquantized_experts(model)
        if four_bit:
            notes += loading.leave_unsupported_layers(model)
        kernel = "bitsandbytes " + ("Linear4bit" if four_bit else "Linear8bitLt")
        if not any(type(m).__module__.startswith("bitsandbytes") for m in model.modules()):
            raise Problem(
                f"{checkpoint.architecture} has no linear layer that bitsandbytes can quantize as {variant.notation}.",
                "Use bf16, or shorten skip=.",
            )
        return LoadedModel(model, kernel, notes)

    def _config(self, variant: Variant, tied: bool) -> dict:
        import torch

        values = self.values(variant)
        config = self._arguments(values, variant.method, tied)
        return {k: getattr(torch, v) if k.endswith(("dtype", "storage")) else v for k, v in config.items()}

    def _arguments(self, values: dict[str, str], method: str, tied: bool) -> dict:
        """Arguments of `BitsAndBytesConfig`, dtypes as torch attribute names."""
        arguments: dict = {"load_in_8bit": True} if method == "int8" else {"load_in_4bit": True}
        if method == "int8":
            arguments["llm_int8_threshold"] = float(values["threshold"])
        else:
            arguments["bnb_4bit_quant_type"] = method
            arguments["bnb_4bit_compute_dtype"] = loading.torch_name(values["compute"]).removeprefix("torch.")
            if values["dq"] == "true":
                arguments["bnb_4bit_use_double_quant"] = True
            if values["storage"] != "uint8":
                arguments["bnb_4bit_quant_storage"] = loading.torch_name(values["storage"]).removeprefix(
                    "torch."
                )
        if values["skip"]:
            skip = set(values["skip"].split("+")) | ({"lm_head"} if tied else set())
            arguments["llm_int8_skip_modules"] = sorted(skip)
        return arguments

    def code(self, variant, placement, *, tied=False, kernel=None):
        values = self.values(variant)
        written = {
            k: f"torch.{v}" if k.endswith(("dtype", "storage")) else repr(v)
            for k, v in self._arguments(values, variant.method, tied).items()
        }
        inner = "".join(f"\n    {k}={v}," for k, v in written.items())
        return (
            ["from transformers import BitsAndBytesConfig"],
            [f"quantization = BitsAndBytesConfig({inner}\n)"],
            [f"dtype={loading.torch_name(values['dtype'])}", "quantization_config=quantization"],
        )

    def code_after(self, variant, layers):
        odd = any(
            row.logical_dtype in ("nf4", "fp4")
            and row.device == "cpu"
            and (row.shape[0] % 32 or row.shape[1] % 64)
            for row in layers
        )
        if not odd:
            return []
        return [
            "for module in model.modules():  # shapes that bitsandbytes' packed AVX-512 kernel refuses",
            '    if hasattr(module, "support_avx512bf16_for_cpu") and (module.out_features % 32 or module.in_features % 64):',
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
            return Logical(state.quant_type, tuple(state.shape), loading.short_name(compute))
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
                return _unpack_avx512(data, state)
            return F.dequantize_4bit(data, state).to(torch.float32)
        if scales := self.quant_state(module):
            return weight.data.to(torch.float32) * (scales["SCB"].to(torch.float32).view(-1, 1) / 127.0)
        return None


def _stays(name: str, skip: str, tied: bool) -> bool:
    """Whether a checkpoint tensor is left unquantized: embeddings, the head, norms, and what `skip` names."""
    module = name.rsplit(".", 1)[0]
    left = skip.split("+") if skip else ["lm_head"]
    # As transformers matches them: a prefix of the full name, or its end.
    head = any(module.startswith(k) or module.endswith(k) for k in left)
    return head or "embed" in module or module.endswith(("wte", "wpe", "norm"))


def _unpack_avx512(packed, state):
    """Undo bitsandbytes' AVX-512 packing on a copy: (N, K/2) bytes of blocks of 32 rows → float32 (N, K).

    The layout is the one bitsandbytes writes at the first forward on such a CPU: within a block of 32 rows,
    byte j of a column pair holds row j in its low half and row j + 32 of the flattened pair in its high half.
    """
    import torch

    n, half = packed.shape
    rows = packed.reshape(-1, 32)
    values = torch.cat([rows & 0xF, rows >> 4], dim=1)
    values = values.reshape(n // 32, half, 32, 2).transpose(1, 2).reshape(n, half * 2)
    absmax = state.absmax.T.to(torch.float32).repeat_interleave(state.blocksize, dim=1)
    return state.code.to(torch.float32)[values.long()] * absmax
