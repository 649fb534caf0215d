"""What is wrong with a request whatever the model is, said before anything runs. Knows no engine."""

from __future__ import annotations

from dataclasses import replace

from comparator.adapters import same_twice
from comparator.backends import resolve
from comparator.judge import check_request
from comparator.settings import Settings, get_settings, parse_max_memory
from comparator.types import Cell, GenerationSettings, Problem, Request


def checked(request: Request, settings: Settings | None = None) -> Request:
    """The request with canonical variants. Raises `Problem` for what is wrong whatever the model is."""
    settings = settings or get_settings()
    if not request.prompt.strip():
        raise Problem("The prompt is empty.", "Type something for the model to answer.")
    if not request.cells:
        raise Problem("No variant is chosen.", "Tick at least one, bf16 for instance.")
    if len(request.cells) > settings.max_columns:
        raise Problem(
            f"{len(request.cells)} columns are asked for; the limit is {settings.max_columns}.",
            "Leave some out (COMPARATOR_MAX_COLUMNS sets the limit).",
        )
    cells = tuple(replace(cell, variant=resolve(cell.variant)) for cell in request.cells)
    twice = {c.label for c in cells if cells.count(c) > 1} | set(filter(None, [same_twice(cells, settings)]))
    if twice:
        raise Problem(
            f"{min(twice)} is chosen twice.", "Keep one of them: the same column would give the same figures."
        )
    reference = (
        replace(request.reference, variant=resolve(request.reference.variant)) if request.reference else None
    )
    if reference and reference not in cells:
        raise Problem(
            f"The reference {reference.label} is not one of the columns.", f"Choose one of {_names(cells)}."
        )
    check_generation(request.settings, settings)
    check_request(request)
    if (request.parallel or settings.parallel) and not settings.ray_address:
        raise Problem(
            "Columns run at the same time only on different devices of a Ray cluster.",
            "Set COMPARATOR_RAY_ADDRESS (docs/cluster.md), or leave --parallel out.",
        )
    parse_max_memory(request.max_memory)
    return replace(request, cells=cells, reference=reference, parallel=request.parallel or settings.parallel)


def check_generation(given: GenerationSettings, settings: Settings) -> None:
    """Ranges of the decoding settings. Raises `Problem` naming the one that is out."""
    ranges = {
        "max_new_tokens": (1, settings.max_new_tokens),
        "temperature": (0, 10),
        "top_p": (0, 1),
        "top_k": (0, 1_000_000),
        "repetition_penalty": (0.01, 10),
        "repeats": (1, 100),
        "seed": (0, 2**63 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(given, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            hint = " COMPARATOR_MAX_NEW_TOKENS sets the limit." if name == "max_new_tokens" else ""
            raise Problem(f"{name} is {value}.", f"It goes from {low} to {high}.{hint}")
    if given.top_p == 0:
        raise Problem("top_p is 0, which leaves no token.", "Use 1 to switch it off, or a share such as 0.9.")
    if given.decode not in ("auto", "both", "eager", "graph", "compiled"):
        raise Problem(
            f"There is no decode path “{given.decode}”.", "Use auto, both, eager, graph or compiled."
        )


def _names(cells: tuple[Cell, ...]) -> str:
    return ", ".join(c.label for c in cells)
