"""The command line: a table of contents. Each command is a module of its own; none needs gradio.

`main` prints a `UserError` as two lines on stderr with exit code 2. The exit code is 1 if a variant failed, and for an
unexpected exception, whose traceback goes to the error log.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli import (
    adapters,
    backup,
    bench,
    doctor,
    export,
    inspect,
    judge,
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

# The program that pip installs (pyproject.toml), where it is what runs.
SCRIPT = "quant-comparator" if Path(sys.argv[0]).stem == "quant-comparator" else None

app = typer.Typer(
    help="Compare quantized variants of one language model: answers, speed, memory, fidelity.",
    epilog="Start with:\n\n  python -m comparator run -p 'What is the capital of France?'",
    no_args_is_help=True,
    add_completion=SCRIPT is not None,  # a shell completes the name of a program, not `python -m …`
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


CODES = "Exit code: 0 on success, 1 if it failed, 2 for an invalid request."
_COMMANDS = {
    "run": (run.run, run.EXAMPLES),
    "layers": (inspect.layers, inspect.LAYERS_EXAMPLES),
    "variants": (inspect.variants, ""),
    "show": (inspect.show, inspect.SHOW_EXAMPLES),
    "vote": (vote.vote, vote.EXAMPLES),
    "judge": (judge.judge, judge.EXAMPLES),
    "quantize": (quantize.quantize, quantize.EXAMPLES),
    "export": (export.export, export.EXAMPLES),
    "train": (train.train, train.EXAMPLES),
    "adapters": (adapters.adapters, adapters.ADAPTERS_EXAMPLES),
    "doctor": (doctor.doctor, doctor.EXAMPLES),
    "bench": (bench.bench, bench.EXAMPLES),
    "sensitivity": (sensitivity.sensitivity, sensitivity.EXAMPLES),
    "plan": (plan.plan, plan.EXAMPLES),
    "sweep": (sweep.sweep, sweep.EXAMPLES),
    "reindex": (reindex.reindex, ""),
    "backup": (backup.backup, backup.BACKUP_EXAMPLES),
    "restore": (backup.restore, backup.RESTORE_EXAMPLES),
    "purge": (purge.purge, purge.EXAMPLES),
}
for _name, (_command, _examples) in _COMMANDS.items():
    _codes = "" if "Exit code" in _examples else CODES
    app.command(_name, epilog=f"{_examples}\n\n{_codes}".strip())(_command)


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot display “–” shows a ?
    try:
        app(prog_name=SCRIPT or "python -m comparator")
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
