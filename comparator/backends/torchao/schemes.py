"""torchao's ways to quantize a linear layer that are offered here: one entry each. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GROUPS = ("256", "128", "64", "32")


@dataclass(frozen=True)
class Scheme:
    """config: its class in torchao.quantization. group_argument: what that calls the weights that share a scale.
    arguments: the others that are set; a torch dtype by its name in torch.
    groups: possible values of the option `group`, the default first; for `GROUPS` that is the largest of 128, 64 and 32
        which divides every layer.
    dtypes: that the activations, and what stays unquantized, can have.
    capability: the CUDA compute capability that it needs; None where any device will do.
    multiple: both sizes of a layer have to be multiples of it; torchao leaves others unquantized.
    decode: as `Method.decode`.
    trains: its layers have gradients, and transformers' Trainer takes them.
    """

    name: str
    words: str
    config: str
    groups: tuple[str, ...]
    group_argument: str = "granularity"
    arguments: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    capability: tuple[int, int] | None = None
    multiple: int = 1
    trains: bool = False
    decode: tuple[str, str] = ("", "")

    @property
    def title(self) -> str:
        """In the list of variants: the words before what is said of kernel and storage."""
        return self.words.partition(",")[0].partition(" (")[0].removesuffix(" for the tinygemm kernel")


_QUIET = {"set_inductor_config": False}  # else it changes torch.compile's options for the whole process
_ANY = ("row", "tensor", *GROUPS)

SCHEMES = (
    Scheme("int8", "8-bit integers, multiplied in the activations' dtype", "Int8WeightOnlyConfig", _ANY,
           arguments=_QUIET, trains=True, decode=("", "faster")),
    # Not fp16: torchao turns the integer product times the activations' scale into it before it scales by row.
    Scheme("int8dyn", "8-bit integers times activations rounded to 8 bits", "Int8DynamicActivationInt8WeightConfig",
           ("row", "tensor"), arguments=_QUIET, dtypes=("bf16", "fp32")),
    Scheme("int4", "4-bit integers for the tinygemm kernel (CUDA)", "Int4WeightOnlyConfig", GROUPS, "group_size",
           {"int4_packing_format": "tile_packed_to_4d", **_QUIET}, ("bf16",), (8, 0), decode=("", "faster")),
    Scheme("intx4", "4-bit integers, each in a byte of its own", "IntxWeightOnlyConfig",
           (*GROUPS, "row"), arguments={"weight_dtype": "int4"}),
    Scheme("fp8", "8-bit floats, multiplied in the activations' dtype", "Float8WeightOnlyConfig", _ANY,
           arguments=_QUIET, trains=True, decode=("", "faster")),
    Scheme("fp8dyn", "8-bit floats times activations rounded to 8 bits (CUDA 8.9 and later)",
           "Float8DynamicActivationFloat8WeightConfig", ("row", "tensor"), arguments=_QUIET, dtypes=("bf16",),
           capability=(8, 9), multiple=16, decode=("", "slower")),
)  # fmt: skip
FOUR_BITS = ("int4", "intx4")
BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
BY_CONFIG = {scheme.config: scheme for scheme in SCHEMES}


def config(scheme: Scheme, group: str) -> Any:
    """torchao's config object. group: "row", "tensor" or a number of weights."""
    import torch
    import torchao.quantization as ao

    arguments = {k: getattr(torch, v) if k.endswith("dtype") else v for k, v in scheme.arguments.items()}
    if scheme.group_argument == "granularity":
        name, values = _granularity(scheme, group)
        return getattr(ao, scheme.config)(granularity=getattr(ao, name)(*values), **arguments)
    return getattr(ao, scheme.config)(**{scheme.group_argument: int(group)}, **arguments)


def config_text(scheme: Scheme, group: str) -> tuple[list[str], str]:
    """The same as source text: (names to import from torchao.quantization, the expression)."""
    written = [f"{k}={f'torch.{v}' if k.endswith('dtype') else repr(v)}" for k, v in scheme.arguments.items()]
    if scheme.group_argument == "granularity":
        name, values = _granularity(scheme, group)
        given, names = f"{name}({', '.join(map(str, values))})", [scheme.config, name]
    else:
        given, names = group, [scheme.config]
    return names, f"{scheme.config}({', '.join([f'{scheme.group_argument}={given}', *written])})"


def _granularity(scheme: Scheme, group: str) -> tuple[str, tuple[int, ...]]:
    """(class in torchao.quantization, its arguments)."""
    if group == "row":
        return ("PerAxis", (0,)) if scheme.config.startswith("Intx") else ("PerRow", ())
    return ("PerTensor", ()) if group == "tensor" else ("PerGroup", (int(group),))
