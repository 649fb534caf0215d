"""What is wrong with a request whatever the model is, checked before anything runs."""

from __future__ import annotations

from dataclasses import replace

from comparator.adapters import same_twice
from comparator.backends import resolve
from comparator.comparison.tasks import catalog
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request, TaskRequest
from comparator.core.settings import Settings, get_settings, parse_max_memory
from comparator.core.variant import Cell
from comparator.fidelity.scorer import check_request


def checked(request: Request, settings: Settings | None = None) -> Request:
    """The request with canonical variants. Raises `UserError` for what is wrong whatever the model is."""
    settings = settings or get_settings()
    if request.task:
        _check_task(request.task, request, settings)
    elif not request.prompt.strip():
        raise UserError("The prompt is empty.", "Enter a prompt.")
    if not request.cells:
        raise UserError("No variant is selected.", "Select at least one, for example bf16.")
    if len(request.cells) > settings.max_columns:
        raise UserError(
            f"{len(request.cells)} columns are requested; the limit is {settings.max_columns}.",
            "Remove some (COMPARATOR_MAX_COLUMNS sets the limit).",
        )
    cells = tuple(replace(cell, variant=resolve(cell.variant)) for cell in request.cells)
    twice = {c.label for c in cells if cells.count(c) > 1} | set(filter(None, [same_twice(cells, settings)]))
    if twice:
        raise UserError(
            f"{min(twice)} is selected twice.", "Remove one of them: both would give the same figures."
        )
    reference = (
        replace(request.reference, variant=resolve(request.reference.variant)) if request.reference else None
    )
    if reference and reference not in cells:
        raise UserError(
            f"The reference {reference.label} is not one of the variants.", f"Choose one of {_names(cells)}."
        )
    check_generation(request.settings, settings)
    check_request(request)
    if (request.parallel or settings.parallel) and not settings.ray_address:
        raise UserError(
            "Variants run at the same time only on different devices of a Ray cluster.",
            "Set COMPARATOR_RAY_ADDRESS (docs/cluster.md), or omit --parallel.",
        )
    parse_max_memory(request.max_memory)
    return replace(request, cells=cells, reference=reference, parallel=request.parallel or settings.parallel)


def _check_task(task: TaskRequest, request: Request, settings: Settings) -> None:
    if settings.public:
        raise UserError("Tasks are not run on a public server.", "Run them on your own installation.")
    if request.prompts:
        raise UserError("Both a prompt set and a task are given.", "Give only one of them.")
    if not task.names or not all(name.strip() for name in task.names):
        raise UserError("No task is named.", "Name one, for example arc_easy, or a folder (docs/tasks.md).")
    if task.limit is not None and task.limit < 1:
        raise UserError(f"The limit is {task.limit} documents.", "Use 1 or more.")
    if task.fewshot is not None and not 0 <= task.fewshot <= 100:
        raise UserError(f"{task.fewshot} examples are requested.", "Use 0 to 100.")
    catalog.require()


def check_generation(generation: GenerationSettings, settings: Settings) -> None:
    """Ranges of the decoding settings. Raises `UserError` naming the one that is out."""
    ranges = {
        "max_new_tokens": (1, settings.max_new_tokens),
        "temperature": (0, 10),
        "top_p": (0, 1),
        "top_k": (0, 1_000_000),
        "repetition_penalty": (0.01, 10),
        "repeats": (0, 100),
        "seed": (0, 2**63 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(generation, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            hint = " COMPARATOR_MAX_NEW_TOKENS sets the limit." if name == "max_new_tokens" else ""
            raise UserError(f"{name} is {value}.", f"It must be between {low} and {high}.{hint}")
    if generation.top_p == 0:
        raise UserError("top_p is 0, which leaves no token.", "Use 1 to disable it, or a value such as 0.9.")
    if generation.decode not in ("auto", "both", "eager", "graph", "compiled"):
        raise UserError(
            f"There is no decode path “{generation.decode}”.", "Use auto, both, eager, graph or compiled."
        )


def _names(cells: tuple[Cell, ...]) -> str:
    return ", ".join(c.label for c in cells)
