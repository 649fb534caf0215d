"""`judge`: a model compares the answers of a saved comparison, in pairs and in both orders."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from comparator.cli.options import Address, AsJson, Quiet, Verbose, print_json, use
from comparator.cli.vote import opened
from comparator.core.result import Comparison
from comparator.core.votes import MOST_JUDGEMENTS

EXAMPLES = """Examples:

  python -m comparator judge set.json --judge bf16 --model user/large-instruct

  python -m comparator judge set.json --judge endpoint@vllm \\
      --limit 40 --reasons

Exit code: 0 on success, 2 for an invalid request, 130 after Ctrl-C. What was judged before that is kept; the same command judges the rest."""


def judge(
    comparison: Annotated[
        str, typer.Argument(metavar="ID|FILE", help="A saved comparison's id, or a document (.json).")
    ],
    judge: Annotated[
        str,
        typer.Option("--judge", metavar="COLUMN", help="The judge: nf4, nf4 + pirate, endpoint@vllm."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="The judge's model. (default: the comparison's)"),
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST_JUDGEMENTS, help="Pairs to judge at most.")
    ] = MOST_JUDGEMENTS,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "-n", metavar="N", min=1, help="Length of its answer. (default: 200)"
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Judge again pairs that this judge has already judged.")
    ] = False,
    reasons: Annotated[
        bool, typer.Option("--reasons", help="Also print its reasons for every pair.")
    ] = False,
    ray: Address = None,
    verbose: Verbose = False,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Have a model compare the answers, in both orders; see win rates and its agreement with the human votes."""
    from comparator import api
    from comparator.cli.progress import Progress, stoppable
    from comparator.cli.progress import quiet as quiet_libraries
    from comparator.comparison import judge as judging
    from comparator.core.errors import Stopped
    from comparator.core.settings import get_settings
    from comparator.deploy.limits import limits_of
    from comparator.engines import get_engine

    use(ray)
    cell, limits, stopped = api.cell(judge), limits_of(get_settings()), False
    limits.check_cell(cell)
    with opened(comparison) as (shown, change):
        limits.check_source(model or shown.model)
        wanted = judging.Judging(
            model or shown.model, cell, limit, max_new_tokens or judging.NEW_TOKENS, fresh
        )

        def keep(made) -> None:
            change(lambda now: judging.with_judge(now, made))

        with (
            quiet_libraries(verbose) as stderr,
            stoppable() as cancel,
            Progress(stderr, silent=silent) as progress,
        ):
            try:
                made = judging.judge(
                    shown, wanted, engine=get_engine(), cancel=cancel,
                    on_progress=progress.report, on_judge=keep,
                )  # fmt: skip
                keep(made)
            except Stopped:
                stopped = True
    with opened(comparison) as (shown, _):
        _print(shown, reasons, as_json)
    if stopped:
        print("Stopped; what was judged is kept.", file=sys.stderr)
    raise typer.Exit(130 if stopped else 0)


def _print(comparison: Comparison, reasons: bool, as_json: bool) -> None:
    """What all judges of the comparison said."""
    from comparator.cli import tables
    from comparator.reporting import votes

    judges = comparison.votes.judges if comparison.votes else ()
    if as_json:
        print_json([asdict(judge) for judge in judges])
        return
    print(tables.judges_table(comparison), end="")
    for judge in judges if reasons else ():
        for prompt, a, b, verdict, *why in votes.reason_rows(comparison, judge):
            lines = (f"{prompt}, {a} (A) and {b} (B): {verdict}", *why)
            print(tables.printable("\n" + "\n  ".join(lines)))
