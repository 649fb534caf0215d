"""A plan as text: the headings and cells of its table, and the sentences around it. "Estimate" is the first word."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

from comparator.capacity.estimate import LABEL, Plan, Row
from comparator.core.state import Resident
from comparator.util import formatting, quantities

HEADINGS = (
    "variant",
    "weights",
    "quant state",
    "KV cache",
    "activations, graphs",
    "total",
    "fits",
    "largest context",
    "roofline",
)


def gigabytes(count: int) -> str:
    """GB = 10⁹ bytes from 0.1 GB on, else MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else formatting.megabytes(count)


def cells(row: Row) -> list[str]:
    """A row's cells, in the order of `HEADINGS`."""
    return [
        row.variant,
        gigabytes(row.weight_bytes),
        gigabytes(row.state_bytes) if row.state_bytes else "0",
        gigabytes(row.kv_bytes),
        gigabytes(row.activation_bytes + row.graph_bytes),
        gigabytes(row.total_bytes),
        "yes" if row.fits else "no",
        f"{row.longest_context:,}" if row.longest_context else formatting.NONE,
        f"{formatting.figure(row.tok_s)} tok/s" if row.tok_s else formatting.NONE,
    ]


def intro(plan: Plan) -> list[str]:
    """What was planned, for the lines above the table."""
    card = plan.card
    rate = f", {card.bytes_s / 1e9:,.0f} GB/s" if card.bytes_s else ", bandwidth not known"
    users = "one sequence" if plan.users == 1 else f"{plan.users:,} sequences at once"
    return [
        f"{LABEL}: {plan.model}, {formatting.parameters(plan.parameters)} parameters, {users} of {plan.context:,} tokens.",
        f"On {card.name}: {gigabytes(card.memory_bytes)} for programs{rate} ({card.source}).",
    ]


def measured(plan: Plan, residents: Iterable[Resident]) -> Iterator[str]:
    """How the estimate of weights and quant state compares with what is resident of this model, and the factor over all of it."""
    rows = {row.variant: row for row in plan.rows if not row.error}
    factors = []
    for resident in residents:
        row = rows.get(resident.variant)
        if row is None or resident.model != plan.model or not resident.bytes:
            continue
        estimate = row.weight_bytes + row.state_bytes
        factors.append(resident.bytes / estimate)
        yield (
            f"Measured here: {row.variant} holds {gigabytes(resident.bytes)} after its first pass; weights and quant state were estimated as "
            f"{gigabytes(estimate)} ({100 * (estimate / resident.bytes - 1):+.1f} %)."
        )
    if len(factors) > 1:
        spread = f" ± {statistics.stdev(factors):.3f}"
        yield (
            f"Measured ÷ estimate over these {len(factors)}: {statistics.fmean(factors):.3f}{spread}. The table is not "
            "corrected by this factor."
        )


def remarks(plan: Plan) -> Iterator[str]:
    """What the figures count, and what could not be estimated."""
    yield (
        f"KV cache: {plan.cache}; {formatting.figure(plan.cache_token_bytes / 1e3)} kB for each further token of one sequence."
    )
    reserve = next((row.reserve_bytes for row in plan.rows if row.reserve_bytes), 0)
    yield f"Total counts {gigabytes(reserve)} reserved for workspaces" + (
        " and CUDA's context." if plan.card.device == "cuda" else "."
    )
    if plan.decode == "graph":
        yield "A captured decode step has a KV cache in addition to that of the prompt; decode=eager needs only one."
    yield (
        "Largest context: tokens per sequence with all sequences at once, up to the model's context length"
        + (f" ({quantities.short(plan.trained_context)})." if plan.trained_context else ".")
    )
    yield (
        "Roofline: tokens per second of all sequences together if a step only read weights and caches once, at full "
        "memory bandwidth; no step can be faster."
    )
    yield from plan.notes
    yield from (f"{row.variant}: {row.error}" for row in plan.rows if row.error)
