"""Ready-made AWQ checkpoints: what they are, and whether transformers loads them as they are meant. Configs and headers.

transformers replaces every linear layer but the output head and what `modules_to_not_convert` names, with one number of
bits and one group size for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comparator.backends.gptqmodel_layers.checks import (
    packed_modules,
    plain_among_packed,
    refuse_fused_experts,
    refuse_head,
)
from comparator.backends.gptqmodel_layers.kernels import Packed
from comparator.core.errors import UserError
from comparator.sources import Checkpoint
from comparator.sources.packed import bits_of

BITS = (2, 3, 4, 8)
_OTHER = "Use a checkpoint in which all layers were quantized in the same way."


@dataclass(frozen=True)
class ReadyMade:
    """An AWQ checkpoint on this machine's disk. `kept`: names of modules that are not quantized, as config.json has them."""

    checkpoint: Checkpoint
    bits: int
    group_size: int
    sym: bool
    kept: tuple[str, ...] = ()

    def packed(self, dtype: str) -> Packed:
        scales = {t.name: t.shape for t in self.checkpoint.tensors if t.name.endswith(".scales")}
        sizes = frozenset(
            (t.shape[0], scales[t.name.removesuffix("qweight") + "scales"][1])
            for t in self.checkpoint.tensors
            if t.name.endswith(".qweight")
        )
        return Packed(self.bits, self.group_size, False, self.sym, dtype, sizes)

    @property
    def config(self) -> dict[str, Any]:
        """`quantization_config` by the names that transformers reads."""
        kept = {"modules_to_not_convert": list(self.kept)} if self.kept else {}
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": not self.sym,
            "version": "gemm",
            **kept,
        }

    @property
    def as_stored(self) -> bool:
        """Whether config.json says all that in names which transformers reads."""
        stored = self.checkpoint.quantization or {}
        return all(stored.get(name, default) == self.config[name] for name, default in
                   (("quant_method", None), ("bits", 4), ("group_size", 128), ("zero_point", True)))  # fmt: skip


def read(checkpoint: Checkpoint) -> ReadyMade:
    """Raises `UserError` for a checkpoint that would not load, or load as something else."""
    config = checkpoint.quantization or {}
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise UserError(
            f"{checkpoint.source} is packed for one kernel only (version {version}).",
            "Use a checkpoint of the version gemm, which is the usual one.",
        )
    bits, group = bits_of(config), config.get("group_size", config.get("q_group_size", 128))
    if bits is None and not {"bits", "w_bit", "wbits"} & set(config):
        bits = 4  # what transformers takes where nothing is said
    if bits not in BITS or not isinstance(group, int) or isinstance(group, bool) or group == 0:
        said = config.get("bits", config.get("w_bit"))
        raise UserError(
            f"{checkpoint.source} says bits={said!r}, group_size={group!r}.",
            "AWQ has 2, 3, 4 or 8 bits, and groups of a multiple of 16 weights.",
        )
    kept = config.get("modules_to_not_convert") or ()
    if not isinstance(kept, (list, tuple)) or not all(isinstance(name, str) for name in kept):
        raise UserError(
            f"modules_to_not_convert of {checkpoint.source} is {kept!r}.",
            "It must be a list of names of modules, or null.",
        )
    ready = ReadyMade(
        checkpoint, bits, group if group > 0 else -1, not config.get("zero_point", True), tuple(kept)
    )
    _check_modules(ready)
    return ready


def _check_modules(ready: ReadyMade) -> None:
    source = ready.checkpoint.source
    packed = packed_modules(
        ready.checkpoint, "AWQ", ("qzeros", "scales"), "It is damaged, or of another format: use another one."
    )
    refuse_head(ready.checkpoint, packed)
    refuse_fused_experts(ready.checkpoint, packed)
    left_out = _left_out(ready.kept)
    if wrong := next((n for n in packed if left_out(n)), None):
        raise UserError(
            f"{wrong} of {source} is quantized, and modules_to_not_convert in its config.json says that it is not.",
            "The files do not belong together: download the checkpoint again.",
        )
    stored = {t.name: t.shape for t in ready.checkpoint.tensors}
    for name in packed:
        _check_shapes(
            ready, name, {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        )
    if plain := plain_among_packed(ready.checkpoint, packed, left_out):
        raise UserError(
            f"{plain}.weight of {source} is not quantized, while the same module of other layers is, and "
            "modules_to_not_convert in its config.json does not name it: transformers would fill it with random numbers.",
            _OTHER,
        )


def _check_shapes(ready: ReadyMade, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """The shapes of one module against the bits and the group size that config.json has for all of them. shapes: of its qweight,
    qzeros and scales."""
    if any(len(shape) != 2 for shape in shapes.values()):
        raise UserError(
            f"{name} of {ready.checkpoint.source} is not stored as AWQ's version gemm stores a layer.", _OTHER
        )
    (inputs, words), (groups, outputs) = shapes["qweight"], shapes["scales"]
    stored_bits = words * 32 / max(outputs, 1)
    if stored_bits not in BITS or shapes["qzeros"] != (groups, words):
        raise UserError(
            f"The shapes of {name} in {ready.checkpoint.source} are not those of AWQ's version gemm: qweight "
            f"{shapes['qweight']}, qzeros {shapes['qzeros']}, scales {shapes['scales']}.",
            "config.json may name the wrong version or method: use a checkpoint of the version gemm.",
        )
    expected = 1 if ready.group_size < 0 else -(-inputs // ready.group_size)
    if stored_bits != ready.bits or groups != expected:
        raise UserError(
            f"{name} of {ready.checkpoint.source} has {stored_bits:g} bits and {groups} groups for {inputs} inputs, "
            f"while config.json says {ready.bits} bits in groups of {ready.group_size}. transformers reads no settings "
            "per module.",
            _OTHER,
        )


def _left_out(kept: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether transformers leaves a module out, by its name."""
    if not kept:
        return lambda name: False
    from transformers.quantizers.quantizers_utils import should_convert_module

    return lambda name: not should_convert_module(name, list(kept))
