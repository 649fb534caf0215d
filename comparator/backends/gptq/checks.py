"""Ready-made GPTQ checkpoints that would load and answer wrongly are refused by name.

optimum replaces every linear layer in the decoder's blocks, with one number of bits and one group size for all, and
nothing outside of them. Zero points are read as config.json labels them.
"""

from __future__ import annotations

from collections.abc import Iterable

from comparator.backends.gptqmodel_layers.checks import plain_among_packed, refuse_head
from comparator.core.errors import UserError
from comparator.sources import Checkpoint, weights

_SAMPLE_BYTES = 2**16
_OTHER = (
    "Use a checkpoint in which all layers were quantized in the same way, or gptq without a source to quantize the model "
    "itself."
)


def check(
    checkpoint: Checkpoint, packed: list[str], bits: int, group_size: int, sym: bool, version: str
) -> None:
    """`packed`: names of the packed modules. Raises `UserError` for other settings per module, a quantized head, and zero points of the other format."""
    shapes = {t.name: t.shape for t in checkpoint.tensors}
    refuse_head(checkpoint, packed)
    for name in packed:
        inputs = shapes[f"{name}.g_idx"][0]
        stored_bits = shapes[f"{name}.qweight"][0] * 32 / max(inputs, 1)
        groups = 1 if group_size <= 0 else -(-inputs // group_size)
        if stored_bits != bits or shapes[f"{name}.scales"][0] != groups:
            raise UserError(
                f"{name} of {checkpoint.source} has its own settings ({stored_bits:g} bits, "
                f"{shapes[f'{name}.scales'][0]} groups), while the others have {bits} bits in groups of {group_size}. "
                "transformers reads no settings per module (dynamic).",
                _OTHER,
            )
    if plain := plain_among_packed(checkpoint, packed):
        raise UserError(
            f"{plain}.weight of {checkpoint.source} is not quantized, while the same module of other layers is. "
            "transformers reads no settings per module (dynamic), and would fill it with random numbers.",
            _OTHER,
        )
    if sym and (stored := stored_format(checkpoint, bits)) not in (None, version):
        raise UserError(
            f"config.json of {checkpoint.source} says that zero points are stored as {version}, and they are stored as "
            f"{stored}: every weight would be off by one step.",
            f"Write “checkpoint_format”: “{stored}” into its quantization_config.",
        )


def stored_format(checkpoint: Checkpoint, bits: int) -> str | None:
    """How symmetric zero points are stored: one less than the middle (gptq) or the middle (gptq_v2); None for neither."""
    zeros = (
        s for s in weights.read_folder(checkpoint.path, checkpoint.source) if s.info.name.endswith(".qzeros")
    )
    for stored in _some(zeros):
        with open(stored.file, "rb") as file:
            file.seek(stored.start)
            data = file.read(min(stored.info.bytes, _SAMPLE_BYTES) // (4 * bits) * 4 * bits)
        for version, value in (("gptq", 2 ** (bits - 1) - 1), ("gptq_v2", 2 ** (bits - 1))):
            word = sum(value << bits * i for i in range(32)).to_bytes(4 * bits, "little")
            if data and data == word * (len(data) // len(word)):
                return version
    return None


def _some(zeros: Iterable[weights.Stored]) -> list[weights.Stored]:
    """The first few; all layers of a checkpoint were written alike."""
    return [stored for stored, _ in zip(zeros, range(8), strict=False)]
