"""`sensitivity`: KL divergence with one part of the model quantized at a time."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import Address, Model, Verbose, use

EXAMPLES = """Examples:

  python -m comparator sensitivity --variant nf4

  python -m comparator sensitivity --variant nf4 --by kind --tokens 1024 \\
      --output sensitivity.csv"""


def sensitivity(
    variant: Annotated[
        str, typer.Option("--variant", "-v", metavar="NOTATION", help="The quantized variant.")
    ] = "nf4",
    reference: Annotated[str, typer.Option(metavar="NOTATION", help="Reference variant.")] = "bf16",
    by: Annotated[
        str,
        typer.Option(
            metavar="module|layer|kind",
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
    with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr) as progress:
        try:
            parts = measure(
                get_engine(), model or get_settings().model, resolve(variant), resolve(reference),
                by=by, text=text, tokens=tokens, cancel=cancel,
                on_progress=lambda *status: progress(Scoring(Cell(resolve(variant)), *status)),
            )  # fmt: skip
        except Stopped:
            raise typer.Exit(130) from None
    print(_table(parts, variant, reference), end="")
    if output:
        rows = [{**asdict(part), "modules": " ".join(part.modules)} for part in parts]
        text_out = (
            json.dumps([asdict(p) for p in parts], indent=1)
            if output.suffix.lower() == ".json"
            else _csv(rows)
        )
        export.write_text(output.expanduser(), text_out)
        print(f"Wrote {output}", file=sys.stderr)


def _table(parts: tuple, variant: str, reference: str) -> str:
    width = max(len(p.name) for p in parts)
    lines = [
        f"{variant} vs {reference}, one part quantized at a time, {parts[0].tokens:,} tokens; KL in nats",
        f"{'part':{width}}  {'mean KL':>9}  {'±':>8}  {'maximum':>8}    top-1",
    ]
    lines += [
        f"{p.name:{width}}  {p.kl_mean:9.2g}  {p.kl_se if p.kl_se is not None else float('nan'):8.1g}  "
        f"{p.kl_max:8.2g}  {p.top1 * 100:5.1f} %"
        for p in parts
    ]
    return "\n".join(lines) + "\n"


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
