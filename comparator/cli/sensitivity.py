"""`sensitivity`: KL divergence with one part of the model quantized at a time."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from comparator.cli.options import Address, AsJson, Model, Quiet, Verbose, use

EXAMPLES = """Examples:

  python -m comparator sensitivity --variant nf4

  python -m comparator sensitivity --variant nf4 --by kind --tokens 1024 \\
      --output sensitivity.csv

Exit code: 0 on success, 2 for an invalid request, 130 after Ctrl-C."""


def sensitivity(
    variant: Annotated[
        str, typer.Option("--variant", "-v", metavar="NOTATION", help="The quantized variant.")
    ] = "nf4",
    reference: Annotated[str, typer.Option(metavar="NOTATION", help="Reference variant.")] = "bf16",
    by: Annotated[
        Literal["module", "layer", "kind"],
        typer.Option(
            help="Quantize one linear layer, one decoder layer, or one kind (all up_proj …) at a time.",
        ),
    ] = "layer",
    tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens of the text.")] = 512,
    model: Model = None,
    eval_text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text file, or wikitext2. (default: the bundled text)"),
    ] = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens per window.")] = 512,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the table as .csv or .json.")
    ] = None,
    ray: Address = None,
    verbose: Verbose = False,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the layers most sensitive to quantization: KL divergence with one part quantized at a time."""
    from comparator.api import _evaluation
    from comparator.backends import resolve
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.core.errors import Stopped
    from comparator.core.events import Scoring
    from comparator.core.settings import get_settings
    from comparator.core.variant import Cell
    from comparator.engines import get_engine
    from comparator.fidelity.sensitivity import measure
    from comparator.reporting import export

    if output:
        export.check_name(output, (".csv", ".json"))
    use(ray)
    text = _evaluation(eval_text, context, context)
    with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr, silent=silent) as progress:
        try:
            parts = measure(
                get_engine(), model or get_settings().model, resolve(variant), resolve(reference),
                by=by, text=text, tokens=tokens, cancel=cancel,
                on_progress=lambda *status: progress(Scoring(Cell(resolve(variant)), *status)),
            )  # fmt: skip
        except Stopped:
            raise typer.Exit(130) from None
    whole = json.dumps([asdict(p) for p in parts], indent=1)
    print(f"{whole}\n" if as_json else _table(parts, variant, reference), end="")
    if output:
        rows = [{**asdict(part), "modules": " ".join(part.modules)} for part in parts]
        export.write_text(output.expanduser(), whole if output.suffix.lower() == ".json" else _csv(rows))
        print(f"Wrote {output}", file=sys.stderr)


def _table(parts: tuple, variant: str, reference: str) -> str:
    from comparator.cli.tables import prose_width, rows_table, to_text
    from comparator.util import formatting

    rows = [
        (
            p.name,
            formatting.small(p.kl_mean) + ("" if p.kl_se is None else f" ± {formatting.small(p.kl_se, 1)}"),
            formatting.small(p.kl_max),
            formatting.percent(p.top1),
        )
        for p in parts
    ]
    intro = f"{variant} vs {reference}, one part quantized at a time, {parts[0].tokens:,} tokens; KL in nats"
    return to_text(intro, "", width=prose_width()) + to_text(
        rows_table(("part", "mean KL", "maximum", "top-1 agreement"), rows)
    )


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
