"""HQQ: 8, 4, 3 or 2 bits per weight with a scale and a zero point per group, made as the checkpoint loads or ready-made.

hqq rounds and unpacks; torch's 4-bit matmul reads what fits it without unpacking.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from comparator.backends import dtypes, row_matmul, saving, transformers_loader
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
from comparator.backends.hqq import ready_made
from comparator.backends.hqq.layout import BITS, Layout
from comparator.backends.linear_layers import linears, require_linears
from comparator.backends.ready_made import (
    FromCheckpoint,
    left_over_note,
    tokenizer_note,
    with_quantization,
)
from comparator.backends.sizes import FLOAT_BYTES, TensorSize, held, plain
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint

_GROUPS = ("8", "16", "32", "64", "128", "256")
_OPTIONS = (
    Option("bits", "bits per weight", "4", choices=tuple(map(str, sorted(BITS, reverse=True))), form="{value}bit"),
    Option("group", "weights of a row that share a scale and a zero point. Default: 64, or the largest smaller size that divides every layer", None, choices=_GROUPS, form="g{value}"),
    Option("kernel", "what multiplies. int4pack: torch's 4-bit matmul, which reads packed weights (4 bits, groups from 32, bf16); "
           "unpack: hqq unpacks each weight before its matmul; auto: int4pack where it fits", "auto",
           choices=("auto", "int4pack", "unpack")),
    Option("dtype", "dtype of the activations and of what stays unquantized", "bf16", choices=DTYPES),
)  # fmt: skip
_STATE = {"scale": "scale", "zero": "zero point", "scales_and_zeros": "scale and zero point"}


class Hqq(FromCheckpoint):
    name = "hqq"
    requires = ("torch", "transformers", "hqq")
    install = "-r requirements-formats.txt"
    libraries = ("comparator.backends.hqq", "hqq")
    weight_name = "W_q"
    reads = ("hqq",)
    decided = ("bits", "group", "dtype")
    overridable = ("dtype",)
    types = tuple(QuantizedType(f"int{bits} (HQQ)", bits) for bits in BITS)
    methods = (
        Method("hqq", "half-quadratic rounding", "8, 4, 3 or 2 bits per weight; scales and zero points are optimized without calibration "
               "text. Made as the checkpoint loads, or ready-made: hqq@user/repo.", _OPTIONS, takes_source=True, precision=33,
               bits=4, presets=("hqq", "hqq:3bit")),
    )  # fmt: skip

    def bits(self, variant: Variant) -> float:
        return int(self.values(variant)["bits"])

    def decode_speed(self, variant: Variant, cuda: bool) -> str:
        return {4: "faster", 8: "similar", 2: "similar"}.get(int(self.bits(variant)), "") if cuda else ""

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        packs = values["bits"] == "4" and values["dtype"] == "bf16" and int(values["group"] or 64) >= 32
        if values["kernel"] == "int4pack" and not packs:
            raise UserError(
                "kernel=int4pack multiplies 4 bits in groups of 32 or more, in bf16.",
                "Leave kernel= out, or write kernel=unpack.",
            )

    def complete_on_the_spot(self, variant, checkpoint, progress=None) -> Variant:
        require_linears(checkpoint, "HQQ")
        values = self.values(variant)
        group = _group(checkpoint, int(values["bits"]), values["group"])
        return self.with_options(variant, {"group": None if group == 64 else str(group)})

    def check_source(self, checkpoint: Checkpoint) -> None:
        ready_made.read(checkpoint)

    def settings(self, checkpoint: Checkpoint, variant: Variant) -> dict[str, str | None]:
        ready = ready_made.read(checkpoint)
        layout = ready.usual
        group = str(layout.group) if str(layout.group) in _GROUPS else None
        return {"bits": str(layout.bits), "group": group, "dtype": ready.dtype}

    # ------------------------------------------------------------ loading

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        if variant.source:
            return super().tensor_sizes(variant, checkpoint, device)
        layout, width = self._made(variant, checkpoint), FLOAT_BYTES[self.values(variant)["dtype"]]
        quantized = {t.name for t in linears(checkpoint) if layout.divides(*t.shape)}
        return [
            TensorSize(t.name, *layout.bytes(*t.shape, width)) if t.name in quantized else plain(t, width)
            for t in held(checkpoint)
        ]

    def workspace_bytes(self, variant, rows, outputs, inputs, device) -> int:
        return 2 * outputs * inputs  # the layer's weight, unpacked for many rows

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        from comparator.backends.hqq.quantizer import HqqLayers
        from comparator.backends.stored_layers.quantizer import StoredLayers

        transformers_loader.refuse_main_memory(placement, "HQQ")
        values = self.values(variant)
        dtype = values["dtype"]
        if dtype == "bf16" and not dtypes.supports_bf16(placement.device):
            raise UserError("This GPU has no bf16.", "Write hqq:dtype=fp16.")
        if variant.source:
            opened = self.opened(variant)
            layouts = ready_made.read(opened).layouts
            layers = StoredLayers("HQQ", _stored_layers(layouts, dtypes.torch_dtype(dtype)))
            model = self.load_opened(
                variant, placement, progress, dtype=dtype, config=with_quantization(opened, layers.to_dict())
            )
            notes = tokenizer_note(opened, checkpoint) + left_over_note(opened) + _mixed(layouts)
        else:
            layers = HqqLayers(dtypes.torch_dtype(dtype), self._made(variant, checkpoint))
            model = transformers_loader.from_pretrained(
                checkpoint, placement, progress, dtype=dtype, quantization_config=layers
            )
            notes = transformers_loader.lent_notes(checkpoint)
        model.hf_quantizer.remove_quantization_config(model)
        kernels = _choose_kernel(model, values["kernel"])
        if not kernels:
            raise UserError(
                f"HQQ quantized no layer of {checkpoint.source} ({checkpoint.architecture}).",
                "Its linear layers have sizes or classes that are left alone: use bf16, int8 or nf4.",
            )
        return LoadedModel(model, " + ".join(kernels), notes)

    def save_on_the_spot(
        self, checkpoint, variant: Variant, placement: Placement, target, progress, change=None
    ):
        """hqq's own layout, which torch's 4-bit matmul has rearranged: loaded without it."""
        from comparator.backends.hqq import write

        if change is not None:
            raise saving.refuse_change(variant)
        plain = self.with_options(variant, {"kernel": "unpack"})
        model = self.load(replace(checkpoint, lent=None), plain, placement, progress).model
        progress(None, "writing the checkpoint")
        write.write(model, target)

    def _made(self, variant: Variant, checkpoint: Checkpoint) -> Layout:
        values = self.values(variant)
        bits = int(values["bits"])
        return Layout(bits, _group(checkpoint, bits, values["group"]))

    # ------------------------------------------------------------ what is stored

    def owns(self, module: Any) -> bool:
        return type(module).__module__ == "comparator.backends.hqq.layer"

    def quant_state(self, module: Any) -> dict[str, Any]:
        if not self.owns(module):
            return {}
        return {name: t for key, name in _STATE.items() if (t := getattr(module, key, None)) is not None}

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        if not self.owns(module) or parameter is not module.W_q:
            return None
        bits = module.quant_config["weight_quant_params"]["nbits"]
        shape = (module.out_features, module.in_features)
        return Logical(f"int{bits} (HQQ)", shape, dtypes.short_name(module.compute_dtype))

    def dequantize(self, module: Any) -> Any | None:
        return module.dequantize().float() if self.owns(module) else None

    # ------------------------------------------------------------ decoding

    def on_parallel_streams(self, module: Any) -> bool:
        """torch's 4-bit matmul and `row_matmul` are one short kernel; unpacking fills the card, and cuBLAS takes a workspace
        per stream."""
        return module.int4pack or _codes(module) is not None

    def capture_forward(self, module: Any, rows: int = 1):
        if rows != 1 or module.int4pack or (codes := _codes(module)) is None:
            return None
        return lambda x: row_matmul.one_row(x, codes, module.bias)

    def capture_note(self, module: Any) -> str:
        return row_matmul.NOTE

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        if adapter.merged or adapter.dora or adapter.peft_type != "LORA":
            raise UserError(
                f"{adapter.source} is {adapter.kind}{', merged' if adapter.merged else ''}, and HQQ layers take an unmerged LoRA "
                "only: another update means rounding the weights again.",
                "Leave :merged out where it is a LoRA; use bf16 or int8 for other adapters.",
            )

    def training(self, variant: Variant, device: str) -> Training:
        dtype = self.values(variant)["dtype"]
        return Training(dtype=dtype, activation_width=4 if dtype == "fp32" else 2)

    def training_variants(self, variant: Variant, device: str) -> list[tuple[Variant, tuple[str, ...]]]:
        """torch's 4-bit matmul has no gradients; hqq's own layer has the same weights."""
        kernel = self.values(variant)["kernel"]
        if kernel == "unpack":
            return [(variant, ())]
        notes = ("Trained with kernel=unpack: torch's 4-bit matmul has no gradients.",)
        return [(self.with_options(variant, {"kernel": "unpack"}), notes if kernel == "int4pack" else ())]

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        if variant.source:
            raise UserError(
                f"There is no code to copy for {variant.notation}: transformers 5 does not load HQQ checkpoints.",
                "Load it here, or quantize the original model with hqq.",
            )
        return (
            ["from hqq.core.quantize import BaseQuantizeConfig, HQQLinear"],
            [],
            [f"dtype={dtypes.torch_name(self.values(variant)['dtype'])}"],
        )

    def code_after(self, variant: Variant, layers: Any) -> list[str]:
        values = self.values(variant)
        bits, group, dtype = values["bits"], values["group"] or 64, dtypes.torch_name(values["dtype"])
        return [
            "head = model.get_output_embeddings()",
            "for name, layer in list(model.named_modules()):",
            "    if type(layer) is torch.nn.Linear and layer is not head:",
            f"        config = BaseQuantizeConfig(nbits={bits}, group_size={group}, axis=1)",
            f"        quantized = HQQLinear(layer, config, compute_dtype={dtype}, device=str(layer.weight.device))",
            "        model.set_submodule(name, quantized)",
        ]


def _stored_layers(layouts: dict[str, Layout], dtype: Any) -> dict[str, Any]:
    """For `StoredLayers`: by module's name, what makes its layer."""
    from comparator.backends.hqq.layer import HQQLinear

    def make(layout: Layout, linear: Any) -> Any:
        return HQQLinear(layout, linear.out_features, linear.in_features, dtype, linear.bias)

    return {name: partial(make, layout) for name, layout in layouts.items()}


def _codes(module: Any) -> row_matmul.Codes | None:
    """The layer as `row_matmul` reads it. hqq packs the halves or quarters of a weight's rows into one byte each; 3 bits, and
    groups along columns, do not end with a row."""
    layout, outputs = module.layout, module.out_features
    planes = 8 // layout.bits
    if layout.bits == 3 or layout.axis == 0 or outputs % planes:
        return None
    stored = module.W_q.view(outputs // planes, module.in_features)
    scale, zero = (t.view(outputs, -1) for t in (module.scale, module.zero))
    codes = row_matmul.Codes(stored, scale, zero, layout.bits)
    return codes if row_matmul.runs_on(codes) else None


def _group(checkpoint: Checkpoint, bits: int, wish: str) -> int:
    """The wish, or without one the largest of 64, 32, 16, 8 that divides every layer. Raises `UserError` naming a layer that
    cannot be grouped."""
    layers = linears(checkpoint)
    for group in [int(wish)] if wish else [64, 32, 16, 8]:
        odd = next((t for t in layers if not Layout(bits, group).divides(*t.shape)), None)
        if odd is None:
            return group
    outputs, inputs = odd.shape
    raise UserError(
        f"Groups of {wish or '64, 32, 16 or 8'} do not divide the {inputs:,} inputs of {odd.name.removesuffix('.weight')} "
        f"({outputs:,} outputs) in {bits} bits.",
        "Leave the group out, or use nf4 or int8 for this model.",
    )


def _mixed(layouts: dict[str, Layout]) -> list[str]:
    """A note where layers are not all stored alike, or grouped along columns."""
    kinds = {(layout.bits, layout.group, layout.axis) for layout in layouts.values()}
    if len(kinds) == 1 and next(iter(kinds))[2] == 1:
        return []
    words = [
        f"{bits} bits in groups of {group} along {'rows' if axis else 'columns'}"
        for bits, group, axis in sorted(kinds)
    ]
    return [f"Its layers have {'; '.join(words)}."]


def _choose_kernel(model: Any, kernel: str) -> list[str]:
    """Rearrange the layers that torch's 4-bit matmul takes. Returns what multiplies, by name."""
    from comparator.backends.hqq.layer import HQQLinear

    names = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, HQQLinear):
            continue
        if kernel != "unpack" and layer.fits_int4pack():
            layer.use_int4pack()
            names.add("torch int4pack")
        elif kernel == "int4pack":
            raise UserError(
                f"torch's 4-bit matmul does not take {name} ({layer.out_features}×{layer.in_features}).",
                "Leave kernel= out.",
            )
        else:
            names.add("hqq, unpacked to the activations' dtype")
    return sorted(names, reverse=True)
