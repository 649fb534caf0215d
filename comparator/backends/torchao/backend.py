"""torchao: 8 and 4 bits per weight, as integers or floats, made as the checkpoint loads or ready-made.

The weights are torchao's tensor subclasses in ordinary linear layers; loading is transformers' own.
"""

from __future__ import annotations

from typing import Any

from comparator.backends import dtypes, row_matmul, transformers_loader
from comparator.backends.base import (
    DTYPES,
    AdapterKind,
    LoadedModel,
    Logical,
    Method,
    Option,
    Placement,
    Progress,
    QuantizedType,
    Training,
)
from comparator.backends.linear_layers import require_linears
from comparator.backends.ready_made import (
    FromCheckpoint,
    left_over_note,
    refuse_contradictions,
    tokenizer_note,
)
from comparator.backends.sizes import FLOAT_BYTES
from comparator.backends.torchao import checkpoints, int8_row
from comparator.backends.torchao.schemes import (
    BY_NAME,
    FOUR_BITS,
    GROUPS,
    SCHEMES,
    Scheme,
    config,
    config_text,
)
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint
from comparator.util.compat.accelerate import real

_OPTIONS = (
    Option("scheme", "; ".join(f"{s.name}: {s.words}" for s in SCHEMES), "int8", choices=tuple(BY_NAME)),
    Option("group", "weights that share a scale: a row, the whole tensor, or that many of a row. Default: a row, or for 4 bits the largest of 128, 64 and 32 that divides every layer", None, choices=("row", "tensor", *GROUPS)),
    Option("dtype", "dtype of the activations and of what stays unquantized", "bf16", choices=DTYPES),
)  # fmt: skip
_ON_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")
_STATE = {"zero_point": "zero point", "scale_and_zero": "scale and zero point"}


class TorchAo(FromCheckpoint):
    name = "torchao"
    requires = ("torch", "transformers", "torchao")
    libraries = ("torchao",)
    loaded_by = ("transformers", "vLLM")
    loggers = ("torchao", "torchao.kernel.intmm")
    reads = ("torchao",)
    decided = ("scheme", "group", "dtype")
    types = (
        QuantizedType("int8 (torchao)", 8, "8-bit integers with scales, in a torchao tensor"),
        QuantizedType("int4 (torchao)", 4),
        QuantizedType("intx4 (torchao)", 4, "4-bit integers with scales, each in a byte of its own"),
        QuantizedType("fp8 (torchao)", 8, "8-bit floats with scales, in a torchao tensor"),
    )
    methods = (
        Method("torchao", "torchao", "8 or 4 bits per weight with scales per row or group; scheme= says which. Made as the checkpoint "
               "loads, or ready-made: torchao@user/repo.", _OPTIONS, takes_source=True, precision=45, bits=8,
               presets=("torchao", "torchao:scheme=int8dyn", "torchao:scheme=fp8", "torchao:scheme=fp8dyn",
                        "torchao:scheme=int4", "torchao:scheme=intx4")),
    )  # fmt: skip

    def describe(self, variant: Variant) -> str:
        options = {n: v for n, v in self.requested(variant).items() if n != "scheme"}
        scheme = BY_NAME[self.values(variant)["scheme"]].title
        return ", ".join([scheme, *(f"{name} {value}" for name, value in options.items())])

    def bits(self, variant: Variant) -> float:
        return 4 if self.values(variant)["scheme"] in FOUR_BITS else 8

    def decode_speed(self, variant: Variant, cuda: bool) -> str:
        return BY_NAME[self.values(variant)["scheme"]].decode[cuda]

    def needs_cuda(self, variant: Variant) -> bool:
        return BY_NAME[self.values(variant)["scheme"]].capability is not None and not variant.source

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        scheme = BY_NAME[values["scheme"]]
        if variant.source and "scheme" not in self.requested(variant):
            return  # the checkpoint decides
        for name, possible in (("group", scheme.groups), ("dtype", scheme.dtypes)):
            if values[name] and values[name] not in possible:
                raise UserError(
                    f"scheme={scheme.name} has no {name}={values[name]}.",
                    f"{name} is one of {', '.join(possible)} there.",
                )

    def complete_on_the_spot(self, variant, checkpoint, progress=None) -> Variant:
        require_linears(checkpoint, "torchao")
        values = self.values(variant)
        scheme = BY_NAME[values["scheme"]]
        if checkpoint.model_type in ("mamba", "falcon_mamba"):
            raise UserError(
                f"torchao's weights cannot be used in {checkpoint.architecture}, whose blocks multiply with them outside of "
                "their linear layers.",
                "Use bf16 for this model.",
            )
        group = checkpoints.group_of(checkpoint, scheme, values["group"])
        return self.with_options(variant, {"group": _written(scheme, group)})

    def check_source(self, checkpoint: Checkpoint) -> None:
        checkpoints.read(checkpoint)

    def settings(self, checkpoint: Checkpoint, variant: Variant) -> dict[str, str | None]:
        stored = checkpoints.read(checkpoint)
        made = {"scheme": stored.scheme.name, "group": stored.group, "dtype": stored.dtype}
        refuse_contradictions(checkpoint, self.requested(variant), made)
        return {**made, "group": _written(stored.scheme, stored.group)}

    # ------------------------------------------------------------ loading

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        if variant.source:
            return super().tensor_sizes(variant, checkpoint, device)
        scheme, group, dtype = self._made(variant, checkpoint)
        return checkpoints.tensor_sizes(checkpoint, scheme, group, FLOAT_BYTES[dtype])

    def workspace_bytes(self, variant, rows, outputs, inputs, device) -> int:
        return 2 * outputs * inputs  # the layer's weight, unpacked for many rows

    def prepare(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> None:
        scheme, _, dtype = self._made(variant, checkpoint)
        _require_device(scheme, placement.device)
        if dtype == "bf16" and not dtypes.supports_bf16(placement.device):
            way = "Use gptq." if variant.source else "Write torchao:dtype=fp16."
            raise UserError("This GPU has no bf16.", way)

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        from transformers import TorchAoConfig

        transformers_loader.refuse_main_memory(placement, "torchao")
        self.prepare(checkpoint, variant, placement, progress)
        scheme, group, dtype = self._made(variant, checkpoint)
        if variant.source:
            opened = self.opened(variant)
            model = self.load_opened(variant, placement, progress, dtype=dtype)
            notes = tokenizer_note(opened, checkpoint) + left_over_note(opened)
            if group not in scheme.groups:
                notes.append(f"Its groups have {group} weights.")
        else:
            quantization = TorchAoConfig(config(scheme, group))
            model = transformers_loader.from_pretrained(
                checkpoint, placement, progress, dtype=dtype, quantization_config=quantization
            )
            notes = transformers_loader.lent_notes(checkpoint)
        classes = sorted(
            {type(weight).__name__ for m in model.modules() if (weight := self._weight(m)) is not None}
        )
        if not classes:
            raise UserError(
                f"torchao quantized no layer of {checkpoint.source} ({checkpoint.architecture}) as {variant.notation}.",
                "Its linear layers have sizes or classes that torchao leaves alone: use bf16, int8 or nf4.",
            )
        if "IntxUnpackedToInt8Tensor" in classes:
            notes.append(
                "torchao keeps each 4-bit value in a byte of its own on this path: rounding and fidelity are those of 4 "
                "bits, memory is that of 8."
            )
        return LoadedModel(model, f"torchao {' + '.join(classes)}", notes)

    def _made(self, variant: Variant, checkpoint: Checkpoint) -> tuple[Scheme, str, str]:
        """(scheme, group, dtype), from the checkpoint where there is a source."""
        if variant.source:
            stored = checkpoints.read(self.opened(variant))
            return stored.scheme, stored.group, stored.dtype
        values = self.values(variant)
        scheme = BY_NAME[values["scheme"]]
        return scheme, checkpoints.group_of(checkpoint, scheme, values["group"]), values["dtype"]

    # ------------------------------------------------------------ what is stored

    def _weight(self, module: Any) -> Any | None:
        """The module's weight where that is a torchao tensor, wherever accelerate keeps it."""
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        weight = weight if weight is None else real(module, "weight", weight)
        return weight if self.library_of(weight) else None

    def owns(self, module: Any) -> bool:
        return self._weight(module) is not None

    def stored_values(self, module: Any, parameter: Any) -> Any:
        return parameter.qdata if self.library_of(parameter) else parameter

    def quant_state(self, module: Any) -> dict[str, Any]:
        if (weight := self._weight(module)) is None:
            return {}
        names = [name for name in weight.__tensor_flatten__()[0] if name != "qdata"]
        return {_STATE.get(name, name.replace("_", " ")): getattr(weight, name) for name in names}

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        if not self.library_of(parameter):
            return None
        dtype = {"Int8Tensor": "int8", "Float8Tensor": "fp8", checkpoints.TILED: "int4"}.get(
            type(parameter).__name__, "intx4"
        )
        rounded = getattr(parameter, "act_quant_kwargs", None) is not None
        compute = dtype if rounded else dtypes.short_name(parameter.dtype)
        return Logical(f"{dtype} (torchao)", tuple(parameter.shape), compute)

    def dequantize(self, module: Any) -> Any | None:
        if (weight := self._weight(module)) is None:
            return None
        if type(weight).__name__ == checkpoints.TILED:  # has no dequantize: its kernel times the identity
            import torch

            inputs = torch.eye(weight.shape[1], dtype=torch.bfloat16, device=weight.device)
            return torch.nn.functional.linear(inputs, weight).t().float().contiguous()
        return weight.dequantize().float()

    # ------------------------------------------------------------ decoding

    def on_parallel_streams(self, module: Any) -> bool:
        """tinygemm and `row_matmul` read packed weights in one short kernel without a workspace. The others unpack the weight
        and multiply with cuBLAS, or multiply 8-bit numbers with cuBLASLt: those take a workspace for each stream."""
        weight = self._weight(module)
        tiled = type(weight).__name__ == checkpoints.TILED and weight.act_pre_scale is None
        return tiled or _codes(weight) is not None

    def capture_forward(self, module: Any, rows: int = 1):
        if rows != 1:
            return None
        weight = self._weight(module)
        if (codes := _codes(weight)) is not None:
            return lambda x: row_matmul.one_row(x, codes, module.bias)
        if not int8_row.rounds_activations(weight) or int8_row.refusal(weight):
            return None
        return lambda x: int8_row.one_row(x, weight, module.bias)

    def capture_note(self, module: Any) -> str:
        return int8_row.NOTE if int8_row.rounds_activations(self._weight(module)) else row_matmul.NOTE

    def graph_refusal(self, module: Any) -> str | None:
        weight = self._weight(module)
        return int8_row.refusal(weight) if int8_row.rounds_activations(weight) else None

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        """Unmerged everything works that is added beside a layer. A merge unpacks, adds and quantizes again; tinygemm's
        layout cannot be unpacked, and peft does this for LoRA alone."""
        packed_away = self.values(variant)["scheme"] == "int4"
        if adapter.merged and (packed_away or adapter.peft_type != "LORA"):
            whose = "torchao's int4 layout, which it cannot unpack" if packed_away else "torchao's tensors"
            raise UserError(
                f"{adapter.source} is {adapter.kind}, and peft cannot merge it into {whose}.",
                f"Leave :merged out ({adapter.source} works unmerged here), or merge on bf16.",
            )
        if packed_away and adapter.dora:
            raise UserError(
                f"{adapter.source} is {adapter.kind}, and DoRA needs the norm of the unpacked weight: peft cannot unpack "
                "torchao's int4 layout.",
                "Use torchao:scheme=intx4 or nf4 for this adapter, or a LoRA without DoRA.",
            )

    def training(self, variant: Variant, device: str) -> Training:
        values = self.values(variant)
        scheme = BY_NAME[values["scheme"]]
        if not scheme.trains:
            able = " or ".join(f"torchao:scheme={s.name}" for s in SCHEMES if s.trains)
            raise UserError(
                f"No adapter can be trained on torchao's {scheme.name}: its matmul has no gradients, or transformers' "
                "Trainer does not take it.",
                f"Train it on {able}, or on bf16; it can be used here afterwards.",
            )
        width = 4 if values["dtype"] == "fp32" else 2
        return Training(dtype=values["dtype"], activation_width=width, unpacked_width=width)

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        values = self.values(variant)
        dtype = f"dtype={dtypes.torch_name(values['dtype'])}"
        if variant.source:
            return [], [], [dtype]
        scheme = BY_NAME[values["scheme"]]
        names, expression = config_text(scheme, values["group"] or _usual(scheme))
        return (
            [
                f"from torchao.quantization import {', '.join(names)}",
                "from transformers import TorchAoConfig",
            ],
            [f"quantization = TorchAoConfig({expression})"],
            [dtype, "quantization_config=quantization"],
        )


def _codes(weight: Any) -> row_matmul.Codes | None:
    """A torchao tensor whose values take a byte each and meet activations as they are; None for others, and where
    `row_matmul` cannot read it."""
    if type(weight).__name__ not in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"):
        return None
    if any(getattr(weight, name, None) is not None for name in _ON_ACTIVATIONS) or weight.qdata.ndim != 2:
        return None
    scale, zero = weight.scale, getattr(weight, "zero_point", None)
    rows = 1 if scale.numel() == 1 else weight.shape[0]
    if scale.numel() % rows or (zero is not None and zero.numel() != scale.numel()):
        return None
    zero = None if zero is None else zero.reshape(rows, -1)
    codes = row_matmul.Codes(weight.qdata, scale.reshape(rows, -1), zero)
    return codes if row_matmul.runs_on(codes) else None


def _usual(scheme: Scheme) -> str:
    """The group of a variant that was not completed for a model."""
    return "128" if scheme.groups[0].isdigit() else scheme.groups[0]


def _written(scheme: Scheme, group: str) -> str | None:
    """As the notation has it: None for what 8 bits have without the option, and for a size that it cannot name."""
    return group if group in scheme.groups and (group.isdigit() or group != scheme.groups[0]) else None


def _require_device(scheme: Scheme, device: str) -> None:
    """Raises `UserError` where the scheme's kernel does not run on the device."""
    if scheme.capability is None:
        return
    advice = {"int4": "Use torchao:scheme=intx4 for the same number of bits, or nf4.",
              "fp8dyn": "Use torchao:scheme=fp8, which rounds the weights alike and multiplies in bf16."}[scheme.name]  # fmt: skip
    wanted = ".".join(map(str, scheme.capability))
    if not device.startswith("cuda"):
        raise UserError(f"torchao's {scheme.name} runs on CUDA only, and this is {device}.", advice)
    import torch

    own = torch.cuda.get_device_capability(device)
    if own < scheme.capability:
        own_text = ".".join(map(str, own))
        raise UserError(
            f"torchao's {scheme.name} needs CUDA compute capability {wanted}; this GPU has {own_text}.",
            advice,
        )
