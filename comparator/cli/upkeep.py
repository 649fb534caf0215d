"""`adapters`, `reindex`: describing an adapter, and mending the index of saved comparisons."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from comparator.types import Problem

ADAPTERS_EXAMPLES = """Examples:

  python -m comparator adapters pirate

  python -m comparator adapters user/repo@v1 --model user/name"""


def adapters(
    source: Annotated[
        list[str] | None,
        typer.Argument(help="pirate, user/repo@revision or a folder; none: those that come with us."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base. (default: COMPARATOR_MODEL, else smollm2-135m)"),
    ] = None,
) -> None:
    """Describe LoRA adapters, and say whether they fit the model. Loads no weights."""
    from comparator.adapters import builtin_names, describe, open_adapter
    from comparator.cli.tables import printable
    from comparator.notation import parse_adapter
    from comparator.settings import get_settings

    wrong = 0
    for text in source or builtin_names():
        facts = describe(open_adapter(parse_adapter(text), progress=_say))
        try:
            checkpoint, notes = _fit(facts, model or get_settings().model)
        except Problem as problem:
            checkpoint, notes, wrong = None, [f"Does not fit: {problem}"], wrong + 1
        share = facts.share(checkpoint.parameters if checkpoint else None)
        lines = {
            "kind": facts.kind,
            "trained on": facts.base_model,
            "revision": facts.revision,
            "rank": facts.rank_text,
            "alpha": facts.alpha,
            "scaling": facts.scaling,
            "targets": f"{', '.join(facts.targets)} ({facts.modules} modules)",
            "brings whole": ", ".join(facts.saved_whole),
            "parameters": f"{facts.parameters:,}" + (f", {share:.4%} of base and adapter" if share else ""),
            "size": f"{facts.bytes / 1e6:.2f} MB, {facts.dtype}",
        }
        print(printable(text))
        for name, value in lines.items():
            if value not in (None, ""):
                print(f"  {name:<13}{printable(f'{value:g}' if isinstance(value, float) else str(value))}")
        for note in notes:
            print(f"  {printable(note)}")
    raise typer.Exit(1 if wrong else 0)


def _fit(facts, model: str):
    from comparator.adapters import check_fit
    from comparator.sources import open_checkpoint

    checkpoint = open_checkpoint(model, progress=_say)
    return checkpoint, check_fit(facts, checkpoint)


def _say(fraction: float | None, message: str) -> None:
    if sys.stderr.isatty():
        done = "" if fraction is None else f" {fraction:.0%}"
        print(f"\r\x1b[K{message}{done}", end="", file=sys.stderr, flush=True)
        if fraction == 1:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def reindex() -> None:
    """Make the index of saved comparisons again from their documents. Nothing is lost by it."""
    from comparator.settings import get_settings
    from comparator.store import open_store

    with open_store() as store:
        count = store.reindex()
    print(
        f"The index holds {count} saved comparison{'' if count == 1 else 's'} of {get_settings().data_dir}."
    )
