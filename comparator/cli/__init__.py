"""The command line: a table of contents. Each command lives in a module of its own; none needs gradio.

`main` turns a `Problem` into two lines on stderr and exit code 2; a column's own failure is exit code 1.
"""

from __future__ import annotations

import sys

import typer

from comparator.cli import bench, inspect, quantize, run, sensitivity, train, upkeep
from comparator.types import Problem

app = typer.Typer(
    help="Run quantized variants of one language model side by side and measure what each costs and gains.",
    epilog="Start with:  python -m comparator run --prompt 'What is the capital of France?'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("run", epilog=run.EXAMPLES)(run.run)
app.command("layers", epilog=inspect.LAYERS_EXAMPLES)(inspect.layers)
app.command("variants")(inspect.variants)
app.command("show", epilog=inspect.SHOW_EXAMPLES)(inspect.show)
app.command("quantize", epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("adapters", epilog=upkeep.ADAPTERS_EXAMPLES)(upkeep.adapters)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("sensitivity", epilog=sensitivity.EXAMPLES)(sensitivity.sensitivity)
app.command("reindex")(upkeep.reindex)


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show “–” gets a ?
    try:
        app(prog_name="python -m comparator")
    except Problem as problem:
        say_problem(problem)
        sys.exit(2)


def say_problem(problem: Problem) -> None:
    from comparator.cli.tables import printable

    print(f"Error: {printable(problem.problem)}", file=sys.stderr)
    if problem.advice:
        print(printable(problem.advice), file=sys.stderr)
