"""Ready-made GPTQ checkpoints: what they are, whether they fit the comparison's model, AutoGPTQ's older layout.

Reads configs and headers; loads no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comparator.backends.gptq import checks
from comparator.backends.gptqmodel_layers.checks import packed_modules, refuse_fused_experts
from comparator.backends.gptqmodel_layers.kernels import Packed
from comparator.backends.gptqmodel_layers.links import laid_out
from comparator.backends.ready_made import config_of, open_source, require_method
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint
from comparator.sources.examine import require_complete

Progress = Callable[[float | None, str], None]

_OWN_NAMES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class ReadyMade:
    """A GPTQ checkpoint on this machine's disk."""

    checkpoint: Checkpoint
    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    version: str  # gptq | gptq_v2: how zero points are stored

    @property
    def legacy(self) -> bool:
        """AutoGPTQ's older layout, which transformers does not find by itself."""
        return not any((self.checkpoint.path / name).is_file() for name in _OWN_NAMES) or not _has_config(
            self.checkpoint.path
        )

    def packed(self, dtype: str) -> Packed:
        sizes = frozenset(
            (t.shape[0] * 32 // self.bits, t.shape[1])
            for t in self.checkpoint.tensors
            if t.name.endswith(".qweight") and len(t.shape) == 2
        )
        return Packed(self.bits, self.group_size, self.desc_act, self.sym, dtype, sizes)


def open_ready(variant: Variant, progress: Progress | None = None) -> ReadyMade:
    """The checkpoint behind `gptq@SOURCE`, downloaded where it is a Hub repo. Raises `UserError`."""
    return read(open_source(variant, progress))


def read(checkpoint: Checkpoint) -> ReadyMade:
    """Raises `UserError` for a checkpoint that is not GPTQ, or of a kind that nothing here loads."""
    require_method(checkpoint, "gptq", ("gptq",))
    config = checkpoint.quantization or {}
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise UserError(
            f"{checkpoint.source} is packed for one kernel only (format {version}).",
            "Use a checkpoint in the format gptq; most repos offer it on another branch.",
        )
    bits, group = config.get("bits"), config.get("group_size", -1)
    if bits not in (2, 3, 4, 8) or not isinstance(group, int):
        raise UserError(
            f"{checkpoint.source} says bits={bits!r}, group_size={group!r}.",
            "transformers loads GPTQ with 2, 3, 4 or 8 bits.",
        )
    modules = packed_modules(
        checkpoint,
        "GPTQ",
        ("qzeros", "scales", "g_idx"),
        "It is damaged, or made by a tool older than AutoGPTQ: use another one.",
    )
    sym = bool(config.get("sym", True))
    checks.check(checkpoint, modules, bits, group, sym, version)
    require_complete(checkpoint)
    refuse_fused_experts(checkpoint, modules)
    return ReadyMade(checkpoint, bits, group, bool(config.get("desc_act", False)), sym, version)


def check_options(ready: ReadyMade, requested: dict[str, str]) -> None:
    """Raises `UserError` for an option that the checkpoint contradicts, by name."""
    actual = {
        "bits": (str(ready.bits), f"{ready.bits}bit"),
        "group": (str(ready.group_size), f"g{ready.group_size}"),
        "desc_act": (str(ready.desc_act).lower(), "desc_act" if ready.desc_act else "no desc_act"),
        "sym": (str(ready.sym).lower(), f"sym={str(ready.sym).lower()}"),
    }
    for name, (value, words) in actual.items():
        if name in requested and requested[name] != value:
            raise UserError(
                f"{name}={requested[name]} is requested, but {ready.checkpoint.source} was made with {words}.",
                "Leave the option out: it comes from the checkpoint.",
            )
    for name in ("damp", "cal"):
        if name in requested:
            raise UserError(
                f"{name}={requested[name]} is requested, but {ready.checkpoint.source} is quantized already.",
                f"{name} applies only when quantizing: remove it, or write gptq without a source.",
            )


def for_transformers(ready: ReadyMade, cache_dir: Path) -> Path:
    """A folder that plain transformers loads: the checkpoint's own, or for the older layout one of links."""
    source = ready.checkpoint.path
    if not ready.legacy:
        return source
    quantization = {**(ready.checkpoint.quantization or {}), "quant_method": "gptq"}
    return laid_out(ready.checkpoint, quantization, cache_dir, "gptq")


def _has_config(path: Path) -> bool:
    return isinstance(config_of(path).get("quantization_config"), dict)
