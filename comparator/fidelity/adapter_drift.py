"""How far an adapter's effect on a variant is from its effect on the reference base.

The effect of an adapter on a base is what it adds to every log-probability: log p(base + adapter) − log p(base). It
is measured at each token of the reference's answer, forced, the way columns are decoded. Put the effect that the
adapter has on the variant onto the reference base, and compare with what the adapter really does there:

    drift = mean KL( p(reference + adapter) ‖ softmax( log p(reference) + log p(variant + adapter) − log p(variant) ) )

0 means that quantizing the base changed nothing about what the adapter does, whatever else it changed. The size of
the effect itself, mean KL( p(reference + adapter) ‖ p(reference) ), says whether a drift is large. Knows logits on
disk only: nothing of columns or events.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comparator.core.errors import Stopped
from comparator.core.result import AdapterDrift
from comparator.engine.protocol import OnProgress, Task, TaskContext

if TYPE_CHECKING:
    from comparator.fidelity.logits_store import StoredLogits

TOKENS = 32  # of the answer; each costs three decode steps more
_BLOCK = 8  # rows at a time in float64


@dataclass(frozen=True)
class MeasureDrift(Task):
    """A task for `LocalEngine.score`: four times the scores of the same tokens. Gives `AdapterDrift`."""

    reference_with: StoredLogits
    reference: StoredLogits
    variant_with: StoredLogits
    variant: StoredLogits

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> AdapterDrift | None:
        kept = (self.reference_with, self.reference, self.variant_with, self.variant)
        count = min(k.count for k in kept)
        if not count or len({k.vocabulary for k in kept}) > 1:
            return None
        sums = [0.0, 0.0, 0.0]
        for start in range(0, count, _BLOCK):
            if cancel.is_set():
                raise Stopped
            on_progress(start / count, "measuring the adapter's effect")
            rows = [k.rows(start, min(start + _BLOCK, count)) for k in kept]
            for place, value in enumerate(compare(*rows)):
                sums[place] += float(value.sum())
        drift, effect, here = (s / count for s in sums)
        return AdapterDrift(kl=drift, effect=effect, effect_here=here, tokens=count)


def compare(reference_with: Any, reference: Any, variant_with: Any, variant: Any) -> tuple[Any, Any, Any]:
    """(drift, effect on the reference, effect on the variant), each (rows,) in nats, from logits (rows, vocabulary)."""
    import torch

    ra, r, va, v = (
        torch.log_softmax(x.to(torch.float64), dim=-1)
        for x in (reference_with, reference, variant_with, variant)
    )
    transplanted = torch.log_softmax(r + va - v, dim=-1)

    def kl(p: Any, q: Any) -> Any:
        # Rounding may leave a divergence of 0 a hair below it.
        return (p.exp() * (p - q)).sum(dim=-1).clamp_min(0.0)

    return kl(ra, transplanted), kl(ra, r), kl(va, v)
