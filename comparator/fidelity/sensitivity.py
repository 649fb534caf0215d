"""Which layer is most sensitive: KL divergence with one part of the model quantized at a time.

The reference runs a text once as it is, and once for every part with that part's layers replaced by the variant's
own quantized ones, kernels and all. What is measured is therefore what one layer does by itself; the sum over the
layers is not the divergence of the whole, in which their errors meet.
"""

from __future__ import annotations

import re
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest
from comparator.core.request import EvalSettings
from comparator.core.variant import Cell, Variant
from comparator.engine.protocol import OnProgress, Task, TaskContext, ignore
from comparator.fidelity import eval_text
from comparator.fidelity.tasks import EncodeText

if TYPE_CHECKING:
    from comparator.engine.protocol import Engine

PARTS = ("module", "layer", "kind")
_NUMBERED = re.compile(r"^(?:.*\.)?(\d+)\.(.+)$")


@dataclass(frozen=True)
class Part:
    """One part of the model, quantized alone. `kl_mean` ± `kl_se` in nats, over `tokens` positions."""

    name: str
    modules: tuple[str, ...]
    kl_mean: float
    kl_se: float | None
    kl_max: float
    top1: float
    tokens: int


def measure(
    engine: Engine,
    model: str,
    variant: Variant,
    reference: Variant,
    *,
    by: str = "module",
    text: EvalSettings | None = None,
    tokens: int = 512,
    cancel: threading.Event | None = None,
    on_progress: OnProgress = ignore,
) -> tuple[Part, ...]:
    """The parts, the worst first.

    Args:
        by: "module", "layer" or "kind" (`PARTS`).
        tokens: how much of the text is read, at most.

    Raises `UserError` for a wrong request, and where the two do not fit on the device together; `Stopped` at Stop.
    """
    cancel, text = cancel or threading.Event(), text or EvalSettings()
    check(variant, reference, by, tokens)
    eval_text.check(text)
    with engine.queue.turn(
        cancel,
        lambda ahead, _: on_progress(None, f"{ahead} ahead"),
        lambda: f"the sensitivity of {variant.notation} is being measured",
    ):
        facts = engine.open(model, cancel, on_progress)
        eval_text.check(text, facts.context_length)
        handles: list[str] = []
        for column in (reference, variant):
            handles.append(resident_handle(engine, model, column, cancel, frozenset(handles), on_progress))
        if not engine.resident(*handles):
            raise UserError(
                f"{reference.notation} and {variant.notation} do not fit on this device together.",
                "Layers are copied from one into the other, so both must be loaded at once: use a smaller model.",
            )
        ids = engine.score(EncodeText(model, text), cancel)
        task = OnePartAtATime(handles[1], handles[0], ids[: tokens + 1], text.context, text.stride, by)
        return engine.score(task, cancel, on_progress)


def resident_handle(
    engine: Engine,
    model: str,
    variant: Variant,
    cancel: threading.Event,
    keep: frozenset[str] = frozenset(),
    on_progress: OnProgress = ignore,
) -> str:
    """The handle of the variant, made resident."""

    def progress(fraction: float | None, message: str) -> None:
        on_progress(fraction, f"{variant.notation}: {message}")

    exact = engine.complete(
        model, Cell(variant), cancel, progress
    ).variant  # a group size, a ready-made checkpoint
    return engine.load(LoadRequest(model, exact, keep=keep), cancel, progress).handle


def check(variant: Variant, reference: Variant, by: str, tokens: int) -> None:
    if by not in PARTS:
        raise UserError(f"“{by}” is not a kind of part.", f"Use one of {', '.join(PARTS)}.")
    if tokens < 2:
        raise UserError(f"{tokens} tokens are too few.", "Use 512, for instance.")
    if variant == reference:
        raise UserError(f"{variant.notation} is the reference itself.", "Choose a quantized variant.")


@dataclass(frozen=True)
class OnePartAtATime(Task):
    """The measurement, on the engine's thread. Returns a tuple of `Part`, the worst first."""

    handle: str
    reference: str
    token_ids: tuple[int, ...]
    context: int
    stride: int
    by: str

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> tuple[Part, ...]:
        from comparator.fidelity import scoring

        with context.column(self.handle) as donor, context.column(self.reference) as base:
            for one in (base, donor):
                one.runtime.require("sensitivity", one.variant)
            groups = parts(base.replaceable(donor), self.by)
            if not groups:
                raise UserError(
                    f"{donor.variant.notation} has no layer that {base.variant.notation} stores differently.",
                    "Choose a quantized variant.",
                )
            measured = []
            with tempfile.TemporaryDirectory(prefix="comparator-") as folder:
                ids = list(self.token_ids)
                logits = scoring.keep_text(
                    base, ids, self.context, self.stride, Path(folder, "reference"), cancel,
                    lambda s: on_progress(None, "scoring the reference"),
                )  # fmt: skip
                for number, (name, modules) in enumerate(groups.items(), 1):
                    if cancel.is_set():
                        raise Stopped
                    with base.with_layers_of(donor, modules):
                        measured.append(self._part(scoring, base, ids, logits, name, modules, cancel))
                    on_progress(number / len(groups), f"{name} alone: {measured[-1].kl_mean:.2g} nats")
        return tuple(sorted(measured, key=lambda part: -part.kl_mean))

    def _part(self, scoring, column, ids, logits, name, modules, cancel) -> Part:
        from comparator.fidelity.divergence import NotFinite

        try:
            figures = scoring.score_text(
                column, ids, self.context, self.stride, logits, cancel, lambda share: None, with_floor=False
            )
        except NotFinite as bad:
            raise scoring.explain_not_finite(bad, f"the model with {name} quantized", "the text") from None
        kl = figures["kl"]
        return Part(
            name, tuple(modules), kl["mean"], kl["se"], kl["max"], figures["top1"]["mean"], figures["tokens"]
        )


def parts(names: list[str], by: str) -> dict[str, list[str]]:
    """Names of modules, grouped: each alone, by decoder layer, or by kind (`mlp.up_proj` of every layer)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        key = name
        if by != "module" and match:
            key = f"layer {match[1]}" if by == "layer" else match[2]
        groups.setdefault(key, []).append(name)
    return groups
