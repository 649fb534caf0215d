"""The command line: a table of contents. Each command is a module of its own; none needs gradio.

`main` prints a `UserError` as two lines on stderr with exit code 2. The exit code is 1 if a variant failed, and for an
unexpected exception, whose traceback goes to the error log.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from comparator.cli import (
    adapters,
    backup,
    bench,
    doctor,
    export,
    inspect,
    plan,
    purge,
    quantize,
    reindex,
    run,
    sensitivity,
    sweep,
    train,
    vote,
)
from comparator.core.errors import UserError

app = typer.Typer(
    help="Compare quantized variants of one language model: answers, speed, memory, fidelity.",
    epilog="Start with:\n\n  python -m comparator run -p 'What is the capital of France?'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        from comparator import __version__

        print(f"Quant Comparator {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself; each command has its own."""


app.command("run", epilog=run.EXAMPLES)(run.run)
app.command("layers", epilog=inspect.LAYERS_EXAMPLES)(inspect.layers)
app.command("variants")(inspect.variants)
app.command("show", epilog=inspect.SHOW_EXAMPLES)(inspect.show)
app.command("vote", epilog=vote.EXAMPLES)(vote.vote)
app.command("quantize", epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("adapters", epilog=adapters.ADAPTERS_EXAMPLES)(adapters.adapters)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("sensitivity", epilog=sensitivity.EXAMPLES)(sensitivity.sensitivity)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep)
app.command("reindex")(reindex.reindex)
app.command("backup", epilog=backup.BACKUP_EXAMPLES)(backup.backup)
app.command("restore", epilog=backup.RESTORE_EXAMPLES)(backup.restore)
app.command("purge", epilog=purge.EXAMPLES)(purge.purge)


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot display “–” shows a ?
    try:
        app(prog_name="python -m comparator")
    except UserError as problem:
        say_problem(problem)
        sys.exit(2)
    except Exception as error:
        from comparator.engine.explain import explain

        problem = explain(error, "run this command")
        say_problem(UserError(problem.problem, "", problem.report))
        sys.exit(1)


def say_problem(problem: UserError) -> None:
    from comparator.cli.tables import printable

    print(f"Error: {printable(problem.problem)}", file=sys.stderr)
    if problem.advice:
        print(printable(problem.advice), file=sys.stderr)
    if problem.report:
        from comparator.cli import error_details
        from comparator.util import error_log

        error_log.adopt(problem)
        error_details.show(problem.report.id, lambda text: print(printable(text), file=sys.stderr))
