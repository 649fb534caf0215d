"""`adapters`: describe LoRA adapters and say whether they fit a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from comparator.cli.options import AsJson, Model, Quiet, print_json
from comparator.core.errors import UserError

if TYPE_CHECKING:
    from comparator.adapters import AdapterFacts
    from comparator.cli.progress import Progress
    from comparator.deploy.limits import Limits
    from comparator.sources import Checkpoint

ADAPTERS_EXAMPLES = """Examples:

  python -m comparator adapters pirate

  python -m comparator adapters user/repo@v1 --model user/name

Exit code: 0 if every adapter fits the model, 1 if one does not, 2 for an invalid request."""


def adapters(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE …",
            help="pirate, user/repo@revision or a folder. (default: the built-in adapters)",
        ),
    ] = None,
    model: Model = None,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Describe LoRA adapters and check that they fit the model. Loads no weights."""
    from comparator.adapters import builtin_names, describe, open_adapter
    from comparator.cli.progress import Progress
    from comparator.cli.tables import printable
    from comparator.core.settings import get_settings
    from comparator.core.variant import parse_adapter
    from comparator.deploy.limits import limits_of

    limits = limits_of(get_settings())
    wrong, described = 0, []
    for text in source or builtin_names():
        adapter = parse_adapter(text)
        limits.check_adapter(adapter)
        with Progress(silent=silent) as progress:
            facts = describe(open_adapter(adapter, progress=progress.report))
            try:
                checkpoint, notes = _fit(facts, model or get_settings().model, limits, progress)
            except UserError as problem:
                checkpoint, notes, wrong = None, [f"Does not fit: {problem}"], wrong + 1
        if as_json:
            known = {k: v for k, v in asdict(facts).items() if k not in ("files", "config", "tensors")}
            described.append({"asked": text, "fits": checkpoint is not None, "notes": notes, **known})
            continue
        share = facts.share(checkpoint.parameters if checkpoint else None)
        lines = {
            "kind": facts.kind,
            "trained on": facts.base_model,
            "revision": facts.revision,
            "rank": facts.rank_text,
            "alpha": facts.alpha,
            "scaling": facts.scaling,
            "targets": f"{', '.join(facts.targets)} ({facts.modules} modules)",
            "full tensors": ", ".join(facts.saved_whole),
            "parameters": f"{facts.parameters:,}" + (f", {share:.4%} of base and adapter" if share else ""),
            "size": f"{facts.bytes / 1e6:.2f} MB, {facts.dtype}",
        }
        print(printable(text))
        for name, value in lines.items():
            if value not in (None, ""):
                print(f"  {name:<13}{printable(f'{value:g}' if isinstance(value, float) else str(value))}")
        for note in notes:
            print(f"  {printable(note)}")
    if as_json:
        print_json(described)
    raise typer.Exit(1 if wrong else 0)


def _fit(facts: AdapterFacts, model: str, limits: Limits, progress: Progress) -> tuple[Checkpoint, list[str]]:
    """The base model and notes about the fit. Raises `UserError` where the adapter does not fit."""
    from comparator.adapters import check_fit
    from comparator.sources import open_checkpoint

    limits.check_source(model)
    checkpoint = open_checkpoint(model, progress=progress.report)
    return checkpoint, check_fit(facts, checkpoint)
