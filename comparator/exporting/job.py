"""Export one variant: checked first, then made again on the engine's thread and written to a folder.

The model is loaded from its checkpoint again and never run before it is written: what is resident has been used, and
libraries repack weights at their first use.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.backends import backend_for, require_full_precision
from comparator.backends.base import Placement
from comparator.core.errors import Stopped, UserError
from comparator.core.result import Comparison
from comparator.core.variant import Adapter, Cell, Variant
from comparator.engine.protocol import Engine, OnProgress, SinglePlaceEngine, ignore
from comparator.exporting import card, folder
from comparator.sources import Checkpoint, open_checkpoint
from comparator.sources.checkpoint import TOKENIZER_FILES
from comparator.sources.license import license_of

if TYPE_CHECKING:
    from comparator.adapters import Plan

_TOKENIZER = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*")


@dataclass(frozen=True)
class ExportRequest:
    """output: the folder to write. comparison: what was measured, for the model card; it has a column of this variant.
    link: where that comparison can be seen. force: replace a checkpoint that is there."""

    model: str
    variant: Variant
    output: Path
    adapter: Adapter | None = None
    comparison: Comparison | None = None
    link: str | None = None
    force: bool = False

    @property
    def cell(self) -> Cell:
        return Cell(self.variant, self.adapter)


@dataclass(frozen=True)
class Exported:
    """notation: how the folder is loaded here. loaded_by: other programs that load it, by their documentation."""

    folder: Path
    notation: str
    bytes: int
    loaded_by: tuple[str, ...]


def export(
    engine: Engine,
    request: ExportRequest,
    cancel: threading.Event | None = None,
    on_progress: OnProgress = ignore,
) -> Exported:
    """Write the variant to `request.output`, whole or not at all. Raises `UserError`, or `Stopped` at Stop."""
    cancel = cancel or threading.Event()
    check(engine, request)
    with engine.queue.turn(
        cancel,
        lambda ahead, _: on_progress(None, f"{ahead} ahead"),
        lambda: f"{request.cell.label} is being exported",
    ):
        return engine.work(_Export(request), cancel, lambda status: on_progress(*status))


def check(engine: Engine, request: ExportRequest) -> None:
    """What can be known before loading. Raises `UserError`."""
    if not isinstance(engine, SinglePlaceEngine):
        raise UserError(
            "Variants are loaded on the machines of a Ray cluster here, and a checkpoint is written only on the machine "
            "that loads it.",
            "Unset COMPARATOR_RAY_ADDRESS to export on this machine.",
        )
    folder.check(request.output, request.force)
    if request.comparison is not None:
        card.column(request.comparison, request.cell)
    backend = backend_for(request.variant)
    if reason := backend.unavailable(request.variant):
        raise UserError(
            f"{request.variant.method} cannot be used here: {reason}.",
            "Install it, or export another variant.",
        )


@dataclass(frozen=True)
class _Export:
    """The work, on the engine's thread. Models are loaded beside what is resident, which is unloaded where memory is short."""

    request: ExportRequest

    def run(self, context: Any, cancel: threading.Event, emit: Any) -> Exported:
        from comparator.backends.transformers_loader import import_quietly
        from comparator.engine.explain import explained
        from comparator.engine.placement import pick_device
        from comparator.metrics.memory import RESERVE_BYTES, give_back

        request = self.request

        def progress(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            emit((fraction, message))

        checkpoint = open_checkpoint(request.model, progress=progress, settings=context.settings)
        if not request.variant.source:
            require_full_precision(checkpoint)
        backend = backend_for(request.variant)
        variant = backend.complete(request.variant, checkpoint, progress)
        plan = _merge_plan(request.adapter, checkpoint, variant, context.settings, progress)
        backend.silence()
        progress(None, f"importing {backend.name}")
        import_quietly(*backend.requires)
        device = pick_device()
        needed = backend.needed_bytes(variant, checkpoint, device)
        context.pool().free_for(needed + RESERVE_BYTES, device)
        try:
            with (
                explained(f"export {request.cell.label}"),
                folder.written(request.output, needed, request.force) as tmp,
            ):
                backend.save(checkpoint, variant, Placement(device), tmp, progress, _merger(backend, plan))
                _copy_tokenizer(checkpoint.path, tmp, keep=bool(variant.source))
                text = card.write(request, variant, checkpoint, license_of(checkpoint), _size(tmp))
                (tmp / "README.md").write_text(text, encoding="utf-8")
                progress(1.0, f"written to {request.output}")
        finally:
            give_back()
        return Exported(
            request.output,
            f"{card.reading_method(variant)}{request.output}",
            _size(request.output),
            backend.loaded_by,
        )


def _merge_plan(
    adapter: Adapter | None, checkpoint: Checkpoint, variant: Variant, settings: Any, progress: Any
) -> Plan | None:
    """How the adapter is merged. Raises `UserError` with what to do instead where the method takes no merge."""
    if adapter is None:
        return None
    from comparator import adapters

    try:
        return adapters.plan(
            replace(adapter, merged=True), checkpoint, variant, progress=progress, settings=settings
        )
    except UserError as problem:
        raise UserError(
            f"{problem.problem} A checkpoint holds merged weights only.",
            f"Export {variant.notation} without {adapter.source} and load the adapter with it; or export bf16 with the "
            "adapter, and quantize that folder.",
        ) from None


def _merger(backend: Any, plan: Plan | None) -> Any:
    if plan is None:
        return None
    from comparator.adapters import attach

    return lambda model: attach.merge(model, backend, plan)[0]


def _copy_tokenizer(source: Path, target: Path, keep: bool) -> None:
    """Tokenizer, chat templates, generation config and license as the model's checkpoint has them. keep: what a ready-made
    checkpoint brought is not replaced."""
    for pattern in _TOKENIZER:
        for file in sorted(source.glob(pattern)):
            place = target / file.name
            if keep and place.exists():
                continue
            if file.is_dir():
                shutil.copytree(file, place, dirs_exist_ok=True)
            else:
                shutil.copy(file, place)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
