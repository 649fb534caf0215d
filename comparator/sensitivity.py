"""Which layer hurts most: KL divergence with one part of the model quantized at a time.

The reference runs a text once as it is, and once for every part with that part's layers replaced by the variant's
own quantized ones, kernels and all. What is measured is therefore what one layer does by itself; the sum over the
layers is not the divergence of the whole, in which their errors meet.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator import evaluation
from comparator.scoring_tasks import Door, EncodeText, Told
from comparator.types import Cell, EvalSettings, Problem, Scoring, Stopped, Variant

if TYPE_CHECKING:
    from comparator.seam import AnyEngine

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
    engine: AnyEngine,
    model: str,
    variant: Variant,
    reference: Variant,
    *,
    by: str = "module",
    text: EvalSettings | None = None,
    tokens: int = 512,
    cancel: threading.Event | None = None,
) -> Iterator[Scoring | tuple[Part, ...]]:
    """Yields progress, last the parts with the worst first. `tokens`: how much of the text is read, at most.

    Raises `Problem` for a wrong request, and where the two do not fit on the device together; `Stopped` at Stop.
    """
    cancel, given = cancel or threading.Event(), text or EvalSettings()
    check(variant, reference, by, tokens)
    evaluation.check(given)
    ticket = engine.turns.enter(lambda: f"the sensitivity of {variant.notation} is being measured")
    cell = Cell(variant)
    try:
        for ahead in engine.turns.wait(ticket, cancel):
            yield Scoring(cell, None, f"{ahead} ahead")
        if cancel.is_set():
            raise Stopped
        yield from _measured(engine, model, variant, reference, by, given, tokens, cancel, cell)
    finally:
        engine.turns.leave(ticket)


def check(variant: Variant, reference: Variant, by: str, tokens: int) -> None:
    if by not in PARTS:
        raise Problem(f"There are no parts “{by}”.", f"Choose one of {', '.join(PARTS)}.")
    if tokens < 2:
        raise Problem(f"{tokens} tokens are too few.", "Use 512, for instance.")
    if variant == reference:
        raise Problem(f"{variant.notation} is the reference itself.", "Choose a quantized variant.")


def _measured(engine, model, variant, reference, by, given, tokens, cancel, cell) -> Iterator[Any]:
    from comparator.engine import Loaded, Progress

    for item in engine.open(model, cancel):
        if isinstance(item, Progress):
            yield Scoring(cell, item.fraction, item.message)
        else:
            evaluation.check(given, item.context_length)
    handles: list[str] = []
    for named in (reference, variant):
        wanted = named
        for item in engine.complete(model, Cell(named), cancel):  # a group size, a ready-made checkpoint
            if isinstance(item, Cell):
                wanted = item.variant
            else:
                yield Scoring(cell, item.fraction, f"{named.notation}: {item.message}")
        for item in engine.load(model, wanted, cancel, keep=frozenset(handles)):
            if isinstance(item, Loaded):
                handles.append(item.handle)
            else:
                yield Scoring(cell, item.fraction, f"{wanted.notation}: {item.message}")
    if not engine.resident(*handles):
        raise Problem(
            f"{reference.notation} and {variant.notation} do not fit on this device together.",
            "Layers are taken from one and put into the other, so both have to be there: use a smaller model.",
        )
    (ids,) = engine.score(EncodeText(model, given), cancel)
    task = OnePartAtATime(handles[1], handles[0], ids[: tokens + 1], given.context, given.stride, by)
    for item in engine.score(task, cancel):
        if isinstance(item, Progress):
            yield Scoring(cell, item.fraction, item.message)
        else:
            yield item


@dataclass(frozen=True)
class OnePartAtATime:
    """The work, on the engine's thread. Gives a tuple of `Part`, the worst first."""

    handle: str
    reference: str
    token_ids: tuple[int, ...]
    context: int
    stride: int
    by: str

    def run(self, door: Door, cancel: threading.Event, told: Told) -> tuple[Part, ...]:
        from comparator import scoring

        slot, base = door.slot(self.handle), door.slot(self.reference)
        with door.wearing(slot, None) as donor, door.wearing(base, None) as model:
            groups = parts(replaceable(donor, slot.backend, model), self.by)
            if not groups:
                raise Problem(
                    f"{slot.variant.notation} has no layer that {base.variant.notation} keeps in another way.",
                    "Choose a quantized variant.",
                )
            found = []
            with tempfile.TemporaryDirectory(prefix="comparator-") as folder:
                ids, path = list(self.token_ids), Path(folder, "reference")
                kept = scoring.keep_text(
                    model,
                    ids,
                    self.context,
                    self.stride,
                    path,
                    cancel,
                    lambda s: told(None, "the reference reads"),
                )
                for number, (name, modules) in enumerate(groups.items()):
                    if cancel.is_set():
                        raise Stopped
                    with swapped(model, donor, modules):
                        found.append(self._part(scoring, model, ids, kept, name, modules, cancel))
                    told((number + 1) / len(groups), f"{name} alone: {found[-1].kl_mean:.2g} nats")
        return tuple(sorted(found, key=lambda part: -part.kl_mean))

    def _part(self, scoring, model, ids, kept, name, modules, cancel) -> Part:
        from comparator.metrics.fidelity import NotFinite

        try:
            figures = scoring.score_text(
                model, ids, self.context, self.stride, kept, cancel, lambda share: None, with_floor=False
            )
        except NotFinite as bad:
            raise scoring.explain_not_finite(bad, f"the model with {name} quantized", "the text") from None
        kl = figures["kl"]
        return Part(
            name, tuple(modules), kl["mean"], kl["se"], kl["max"], figures["top1"]["mean"], figures["tokens"]
        )


def replaceable(donor: Any, backend: Any, model: Any) -> list[str]:
    """Names of the layers that the variant keeps in another way than the reference: the quantized ones, or every
    linear layer of a variant that is not quantized."""
    import torch

    here = dict(model.named_modules())
    quantized = [n for n, m in donor.named_modules() if n in here and backend.quant_state(m)]
    return quantized or [n for n, m in donor.named_modules() if n in here and isinstance(m, torch.nn.Linear)]


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


@contextlib.contextmanager
def swapped(model: Any, donor: Any, names: list[str]) -> Iterator[None]:
    """Inside, the named layers of `model` are the donor's. Whatever happens, its own are back afterwards."""
    originals = {name: model.get_submodule(name) for name in names}
    kind = next((p.dtype for p in donor.parameters() if p.is_floating_point()), None)
    try:
        for name in names:
            model.set_submodule(name, _casting(donor.get_submodule(name), kind))
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def _casting(inner: Any, dtype: Any) -> Any:
    """The layer, fed in its own model's dtype; its output goes on in the dtype of the model it was put into."""
    import torch

    class Cast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, *rest, **named):
            return self.inner(x if dtype is None else x.to(dtype), *rest, **named).to(x.dtype)

    return Cast()
