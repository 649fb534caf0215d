"""Headers of checkpoints: which layers torchao quantizes and how many bytes they take, and what a ready-made one was
made with. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comparator.backends import sizes
from comparator.backends.linear_layers import linears
from comparator.backends.sizes import TensorSize
from comparator.backends.torchao.schemes import BY_CONFIG, Scheme
from comparator.core.errors import UserError
from comparator.sources import Checkpoint

_PREFERRED = ("128", "64", "32")
TILED = "Int4TilePackedTo4dTensor"
READABLE = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor", TILED)
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def group_of(checkpoint: Checkpoint, scheme: Scheme, wish: str) -> str:
    """The value of `group` for this model: the wish, or without one the scheme's default. Raises `UserError` naming a
    layer that the wish does not divide, or where none of the group sizes divides all."""
    layers = linears(checkpoint)
    fitting = [g for g in _PREFERRED if all(t.shape[1] % int(g) == 0 for t in layers)]
    if not wish and not scheme.groups[0].isdigit():
        return scheme.groups[0]
    if not wish and fitting:
        return fitting[0]
    wish = wish or _PREFERRED[-1]
    if wish.isdigit() and (odd := next((t for t in layers if t.shape[1] % int(wish)), None)):
        others = [*(g for g in scheme.groups if not g.isdigit()), *fitting]
        raise UserError(
            f"group={wish} does not divide the {odd.shape[1]:,} inputs of {odd.name.removesuffix('.weight')}.",
            f"Possible for {checkpoint.source}: group={', '.join(others)}." if others
            else f"torchao:scheme={scheme.name} needs groups; use scheme=int8 or nf4 for this model.",
        )  # fmt: skip
    return wish


def tensor_sizes(checkpoint: Checkpoint, scheme: Scheme, group: str, width: int) -> Iterator[TensorSize]:
    """The checkpoint's tensors quantized like this. width: bytes of an unquantized value."""
    quantized = {t.name for t in linears(checkpoint)}
    for tensor in sizes.held(checkpoint):
        if tensor.name not in quantized or any(size % scheme.multiple for size in tensor.shape):
            yield sizes.plain(tensor, width)
            continue
        outputs, inputs = tensor.shape
        if scheme.name == "int4":  # padded to the kernel's tiles; a scale and a zero point in bf16
            outputs, inputs = -(-outputs // 8) * 8, -(-inputs // 1024) * 1024
            yield TensorSize(tensor.name, outputs * inputs // 2, 4 * outputs * inputs // int(group))
            continue
        scales = outputs * inputs // int(group) if group.isdigit() else outputs if group == "row" else 1
        per_scale = {"int8": 5, "int8dyn": 5, "intx4": width + 1}.get(scheme.name, 4)
        yield TensorSize(tensor.name, outputs * inputs, per_scale * scales)


# ---------------------------------------------------------------- ready-made checkpoints


@dataclass(frozen=True)
class Stored:
    """How a ready-made checkpoint was quantized. group: as the option has it, or another number of weights."""

    scheme: Scheme
    group: str
    dtype: str
    tensor_classes: tuple[str, ...]


def read(checkpoint: Checkpoint) -> Stored:
    """Raises `UserError` for a checkpoint of another scheme than those in `SCHEMES`, and for one without the metadata that
    transformers needs to put its tensors together."""
    scheme, recipe = _recipe(checkpoint)
    described = _metadata(checkpoint)
    classes = tuple(sorted({kind for kind, _ in described}))
    if not classes:
        raise UserError(
            f"The files of {checkpoint.source} do not say how their torchao tensors are composed: their metadata lists "
            "no quantized tensor.",
            "Save the model again with save_pretrained of transformers 5 and torchao 0.15 or later.",
        )
    if strange := [kind for kind in classes if kind not in READABLE]:
        raise UserError(
            f"{checkpoint.source} contains weights as {strange[0]}, for which there is no kernel here.",
            'For 4 bits on CUDA save it with int4_packing_format="tile_packed_to_4d"; for any device with '
            "IntxWeightOnlyConfig.",
        )
    dtypes = [_SHORT.get(str((data.get("dtype") or {}).get("_data"))) for _, data in described]
    return Stored(scheme, _group(recipe, scheme), next(filter(None, dtypes), "bf16"), classes)


def _recipe(checkpoint: Checkpoint) -> tuple[Scheme, dict[str, Any]]:
    """(scheme, attributes of torchao's config as config.json has them)."""
    written = (checkpoint.quantization or {}).get("quant_type")
    written = written.get("default") if isinstance(written, dict) else written
    name = written.get("_type") if isinstance(written, dict) else written
    if not isinstance(written, dict) or name not in BY_CONFIG:
        raise UserError(
            f"{checkpoint.source} was made with torchao's {str(name)[:80]}, which is not read here.",
            f"Use a checkpoint that was made with {', '.join(BY_CONFIG)}.",
        )
    scheme, recipe = BY_CONFIG[name], written.get("_data") or {}
    wanted = scheme.arguments.get("weight_dtype")
    if wanted and (stored := (recipe.get("weight_dtype") or {}).get("_data")) != wanted:
        raise UserError(
            f"{checkpoint.source} was made with {name} and {stored} weights, which are not read here.",
            f"Use one with {wanted} weights.",
        )
    return scheme, recipe


def _metadata(checkpoint: Checkpoint) -> list[tuple[str, dict[str, Any]]]:
    """(class, attributes) of each quantized tensor, from the files' metadata."""
    from safetensors import safe_open

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as header:
            entries = header.metadata() or {}
        for name, text in entries.items():
            try:
                value = json.loads(text)
            except ValueError:
                continue
            if isinstance(value, dict) and value.get("_type") not in (None, "Tensor"):
                data = value.get("_data")
                found[name] = str(value["_type"]), data if isinstance(data, dict) else {}
    return list(found.values())


def _group(recipe: dict[str, Any], scheme: Scheme) -> str:
    given = recipe.get("granularity")
    given = given[-1] if isinstance(given, list) and given else given  # of activations and weights
    if isinstance(given, dict):
        size = (given.get("_data") or {}).get("group_size")
        named = {"PerTensor": "tensor", "PerGroup": str(size)}
        return named.get(str(given.get("_type")), "row")
    return str(recipe.get("group_size") or scheme.groups[0])
