"""What an FP8 checkpoint has to be like for its weights to be read with the right scales."""

from __future__ import annotations

from comparator.core.errors import UserError
from comparator.sources import Checkpoint, TensorInfo

_OTHER = "Use a checkpoint that transformers reads: FP8 linear layers, each with a weight_scale_inv."


def check(checkpoint: Checkpoint) -> None:
    """Every FP8 weight with its scales, by names and shapes. Raises `UserError` for what would load as something else."""
    source, config = checkpoint.source, checkpoint.quantization or {}
    if str(config.get("expert_dtype") or "fp8") != "fp8":
        raise UserError(f"{source} has experts in {config['expert_dtype']}, which are not read here.", _OTHER)
    block = _block(checkpoint)
    stored = {t.name: t for t in checkpoint.tensors}
    scaled_weights = weights(checkpoint)
    if not scaled_weights:
        raise UserError(f"{source} says fp8, and none of its tensors is FP8.", _OTHER)
    for weight in scaled_weights:
        scale = stored.get(f"{weight.name}_scale_inv")
        if not weight.name.endswith(".weight") or scale is None:
            older = f"{weight.name}_scale" in stored
            raise UserError(
                f"{weight.name} of {source} is FP8 and has no matching weight_scale_inv"
                + (
                    ", only a weight_scale, which transformers does not read in this format."
                    if older
                    else "."
                ),
                _OTHER,
            )
        _check_grid(source, weight, scale, block)
    scaled = {f"{w.name}_scale_inv" for w in scaled_weights}
    if alone := [name for name in stored if name.endswith("_scale_inv") and name not in scaled]:
        raise UserError(f"{alone[0]} of {source} scales a weight that is not FP8.", _OTHER)


def why_unpacked(checkpoint: Checkpoint) -> str | None:
    """Why the weights cannot stay packed, as a clause; None where they can."""
    for weight in weights(checkpoint):
        if ".experts." in weight.name:
            return f"transformers keeps the experts of a layer as one parameter ({weight.name})"
        if weight.dtype != "fp8_e4m3" or not weight.name.startswith("model.layers."):
            return f"{weight.name} ({weight.dtype}) is not an E4M3 weight of a decoder layer"
    return None


def weights(checkpoint: Checkpoint) -> list[TensorInfo]:
    return [t for t in checkpoint.tensors if t.dtype.startswith(("fp8_e4m3", "fp8_e5m2"))]


def _block(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(rows, columns) of weights that share a scale; None for one scale per tensor."""
    size = (checkpoint.quantization or {}).get("weight_block_size", (128, 128))
    if size is None:
        return None
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(type(n) is int and n > 0 for n in size)
    ):
        raise UserError(
            f"weight_block_size of {checkpoint.source} is {size!r}.",
            "It must be two numbers, such as [128, 128], or null.",
        )
    return size[0], size[1]


def _check_grid(source: str, weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None) -> None:
    """transformers divides a weight evenly by the number of its scales, which is wrong where the last block is smaller."""
    if len(weight.shape) != 2:
        raise UserError(f"{weight.name} of {source} has the shape {weight.shape}, not (out, in).", _OTHER)
    if block is None:
        if scale.parameters != 1:
            raise UserError(
                f"{scale.name} of {source} contains {scale.parameters:,} scales, and config.json has no weight_block_size: "
                "one scale per tensor.",
                "config.json may be of another checkpoint: download it again.",
            )
        return
    expected = tuple(-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    if scale.shape != expected:
        raise UserError(
            f"{scale.name} of {source} has the shape {scale.shape}; blocks of {block[0]}×{block[1]} in a weight of "
            f"{weight.shape} give {expected}.",
            "config.json may be of another checkpoint, or a file is damaged: download the checkpoint again.",
        )
    if any(size % part for size, part in zip(weight.shape, block, strict=True)):
        raise UserError(
            f"Blocks of {block[0]}×{block[1]} do not divide {weight.name} of {source}, {weight.shape}: transformers "
            "unpacks such a weight with the wrong scales.",
            "Use the full-precision model, and int8 or torchao:scheme=fp8 for 8 bits.",
        )
