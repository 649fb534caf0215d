"""`sweep`: speed and memory over batch sizes and contexts. Logic is in comparator/capacity/sweep.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comparator.cli.options import Address, AsJson, Model, Quiet, Verbose, notations, print_json, use
from comparator.core.errors import UserError

if TYPE_CHECKING:
    from comparator.capacity.sweep import Sweep

EXAMPLES = """Examples:

  python -m comparator sweep -v bf16 -v nf4 --batch 1,4,16 --context 512,2k

  python -m comparator sweep --shapes llama-8b -v bf16 -v nf4 --batch 1,8,32 \\
      --context 512,8k -o sweep.json -o sweep.csv

  python -m comparator sweep -v endpoint@vllm --concurrency 1,2,4,8 \\
      --ttft 0.5s --itl 50ms

Exit code: 0 on success, 1 if no point could be measured,
2 for an invalid request, 130 after Ctrl-C, which keeps what was measured."""


def sweep(
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", "-v", metavar="NOTATION", autocompletion=notations, help="Variant; repeatable, or a list separated by spaces. The others are "
                     "compared with the first. (default: bf16 int8 nf4)"),
    ] = None,
    model: Model = None,
    shapes: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Random weights with the shapes of llama-8b, llama-1b or llama-tiny instead of a model."),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", "--concurrency", metavar="LIST", help="Sequences decoded at once, for a server concurrent requests: 1,4,16.")
    ] = "1,4,16",
    context: Annotated[str, typer.Option(metavar="LIST", help="Tokens of each prompt: 512,2k.")] = "512",
    new_tokens: Annotated[int, typer.Option(min=3, metavar="N", help="Tokens to generate per sequence.")] = 32,
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="Decode runs of each point; from three on, variants are called faster or slower.")
    ] = 3,
    ttft: Annotated[
        str | None, typer.Option(metavar="TIME", help="Goodput: count requests whose first token comes within this time, for example 0.5s.")
    ] = None,
    itl: Annotated[
        str | None, typer.Option(metavar="TIME", help="Goodput: count requests whose mean inter-token latency is at most this, for example 50ms.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the random weights here and keep them.")
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write the results as .json or .csv; repeatable."),
    ] = None,
    as_json: AsJson = False,
    ray: Address = None,
    verbose: Verbose = False,
    silent: Quiet = False,
) -> None:  # fmt: skip
    """Measure speed, latency and memory over batch sizes and contexts: from which batch on is which variant faster?"""
    from comparator.backends import resolve
    from comparator.capacity import points
    from comparator.capacity import sweep as sweeps
    from comparator.cli.bench import random_shapes
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.core.errors import Stopped
    from comparator.core.settings import get_settings
    from comparator.engines import get_engine
    from comparator.reporting import export
    from comparator.reporting.sweep import FORMATS
    from comparator.util import quantities

    if shapes and model:
        raise UserError("Both --shapes and --model are given.", "Use only one of them.")
    files = [export.check_name(path, FORMATS) for path in output or ()]
    options = points.Options(
        quantities.several(batch), quantities.several(context), new_tokens, repeats,
        ttft_limit_s=quantities.seconds(ttft) if ttft else None, itl_limit_s=quantities.seconds(itl) if itl else None,
    )  # fmt: skip
    options.check()
    variants = [resolve(name) for text in variant or ["bf16 int8 nf4"] for name in text.split()]
    use(ray)
    made: list[Path] = []
    name = model or get_settings().model
    try:
        with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr, silent=silent) as progress:
            if shapes:
                name, variants = random_shapes(shapes, variants, keep, made, progress.status)

            def on_point(measured: Sweep) -> None:
                _write(files, measured)  # after each point, so that an interruption loses nothing

            measured = sweeps.run(
                get_engine(), name, variants, options, cancel,
                lambda fraction, message: progress.status(message, fraction), on_point,
            )  # fmt: skip
    except Stopped:
        raise typer.Exit(130) from None
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json(measured.to_dict())
    else:
        print(_shown(measured), end="")
    for path in files:
        print(f"Wrote {path}", file=sys.stderr)
    raise typer.Exit(130 if measured.stopped else 0 if any(p.runs for p in measured.points) else 1)


def _shown(measured: Sweep) -> str:
    from rich.text import Text

    from comparator.capacity import sweep_words
    from comparator.cli.tables import plain_table, printable, prose_width, to_text

    table = plain_table()
    columns = sweep_words.columns(measured)
    for column in columns:
        table.add_column(column.heading, justify="left" if column.heading == "variant" else "right")
    for point in sweep_words.ordered(measured):
        table.add_row(*(Text(printable(column.cell(point))) for column in columns))
    lines = (Text(printable(line)) for line in sweep_words.remarks(measured))
    intro = to_text(Text(printable(sweep_words.intro(measured))), "", width=prose_width())
    return intro + to_text(table, "") + to_text(*lines, width=prose_width())


def _write(files: list[Path], measured: Sweep) -> None:
    from comparator.reporting import export, sweep

    for path in files:
        export.write_text(path, sweep.text(measured, path.suffix.lower()))
