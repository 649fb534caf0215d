"""`doctor`: what is wrong with a model, a variant or an adapter, found out without loading weights."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comparator.cli.options import AsJson, Quiet, notations, print_json
from comparator.core.errors import UserError
from comparator.sources.checkpoint import Checkpoint, Progress
from comparator.sources.prompt_checks import Check

if TYPE_CHECKING:
    from comparator.deploy.limits import Limits

EXAMPLES = """Examples:

  python -m comparator doctor user/model

  python -m comparator doctor /path/to/folder -v nf4 -v gptq@user/model-GPTQ \\
      -a pirate

Exit code: 0 if nothing is wrong, 1 if something is, 2 for an invalid request."""


def doctor(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A built-in name, user/name@revision, a folder or a GGUF file."),
    ],
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            "-v",
            metavar="NOTATION",
            autocompletion=notations,
            help="Variant to check; repeatable.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="SOURCE", help="Adapter to check; repeatable."),
    ] = None,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check a model's files before the first run: weights, tokenizer, chat template, stop tokens. Loads no weights."""
    from comparator.backends.transformers_loader import import_quietly
    from comparator.cli import progress as shown
    from comparator.cli.tables import prose_width, to_text
    from comparator.core.settings import get_settings
    from comparator.deploy.limits import limits_of
    from comparator.sources import open_checkpoint, prompt_checks

    limits = limits_of(get_settings())
    limits.check_source(model)
    import_quietly("torch", "transformers")
    import transformers

    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    checks: list[Check] = []
    with shown.Progress(silent=silent) as progress:
        try:
            checkpoint = open_checkpoint(model, progress=progress.report)
        except UserError as problem:
            checkpoint = None
            checks.append(Check("model", False, str(problem)))
        if checkpoint is not None:
            checks += [_weights(checkpoint), *prompt_checks.check(checkpoint)]
            checks += [_variant(text, checkpoint, progress.report, limits) for text in variant or ()]
            checks += [_adapter(text, checkpoint, progress.report, limits) for text in adapter or ()]
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        # In a pipe nothing is wrapped, so that a line can be searched.
        width = prose_width() if sys.stdout.isatty() else None
        print(to_text(_table(checks, narrow=width is not None), width=width), end="")
    raise typer.Exit(0 if all(c.ok for c in checks) else 1)


def _table(checks: list[Check], narrow: bool) -> Any:
    from rich.text import Text

    from comparator.cli.tables import plain_table, printable

    table = plain_table()
    table.add_column("checked", overflow="fold", max_width=32 if narrow else None)
    table.add_column("")
    table.add_column("found", overflow="fold")
    for check in checks:
        state = Text("ok", "green") if check.ok else Text("problem", "bold red")
        table.add_row(Text(printable(check.subject)), state, Text(printable(check.found)))
    return table


def _weights(checkpoint: Checkpoint) -> Check:
    from comparator.sources.examine import examine

    result = examine(checkpoint)
    text = str(result.problem) if result.problem else result.line.removeprefix("examined: ")
    finding = f"{text} (examined in {result.took_s:.2f} s)"
    return Check(
        "weights", result.problem is None, f"{finding}. {checkpoint.note}" if checkpoint.note else finding
    )


def _variant(text: str, checkpoint: Checkpoint, report: Progress, limits: Limits) -> Check:
    from comparator.backends import (
        backend_for,
        require_full_precision,
        resolve,
        source_kind,
        unquantized_experts,
    )  # fmt: skip
    from comparator.engine.placement import pick_device

    try:
        variant = resolve(text)
        if variant.source:
            limits.check_source(variant.source, source_kind(variant))
        else:
            require_full_precision(checkpoint)
        backend = backend_for(variant)
        if reason := backend.unavailable(variant):
            raise UserError(f"{variant.method} cannot be used here: {reason}.")
        variant = backend.complete(variant, checkpoint, report)
        needed = backend.needed_bytes(variant, checkpoint, pick_device())
        experts = unquantized_experts(variant, checkpoint)
        size = f"about {needed / 1e6:,.0f} MB" if needed else "takes no memory here"
        return Check(text, True, f"{variant.notation}, {size}{'. ' if experts else ''}{experts}")
    except UserError as problem:
        return Check(text, False, str(problem))


def _adapter(text: str, checkpoint: Checkpoint, report: Progress, limits: Limits) -> Check:
    from comparator.adapters import check_fit, describe, open_adapter
    from comparator.core.variant import parse_adapter

    try:
        adapter = parse_adapter(text)
        limits.check_adapter(adapter)
        facts = describe(open_adapter(adapter, progress=report))
        notes = check_fit(facts, checkpoint)
        finding = (
            f"{facts.kind}, rank {facts.rank_text}, on {', '.join(facts.targets)} ({facts.modules} modules)"
        )
        return Check(text, True, " ".join([finding + ".", *notes]))
    except UserError as problem:
        return Check(text, False, str(problem))
