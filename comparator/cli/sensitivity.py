"""`sensitivity`: which layer hurts most."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.ray import Address, use

EXAMPLES = """Examples:

  python -m comparator sensitivity --variant nf4

  python -m comparator sensitivity --variant nf4 --by kind --tokens 1024 --output hurt.csv"""


def sensitivity(
    variant: Annotated[
        str, typer.Option("--variant", "-v", metavar="NOTATION", help="The quantized variant.")
    ] = "nf4",
    reference: Annotated[str, typer.Option(help="What it is measured against.")] = "bf16",
    by: Annotated[
        str,
        typer.Option(help="module: each layer alone; layer: a decoder layer at a time; kind: all up_proj …"),
    ] = "layer",
    tokens: Annotated[int, typer.Option(help="How much of the text is read, at most.")] = 512,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model. (default: COMPARATOR_MODEL, else smollm2-135m)"),
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text file, or wikitext2. (default: the text we ship)"),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens scored at once.")] = 512,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write all parts: .csv or .json.")
    ] = None,
    ray: Address = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries log.")] = False,
) -> None:
    """Say which layer hurts most: KL divergence with one part of the model quantized at a time."""
    from comparator import report
    from comparator.api import _evaluation
    from comparator.backends import resolve
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.engine import get_engine
    from comparator.sensitivity import measure
    from comparator.settings import get_settings
    from comparator.types import Scoring, Stopped

    if output:
        report.check_name(output, (".csv", ".json"))
    use(ray)
    text = _evaluation(eval_text, context, context)
    found: tuple = ()
    with quiet(verbose) as stderr, stoppable() as cancel:
        progress = Progress(stderr, 1)
        try:
            for item in measure(
                get_engine(), model or get_settings().model, resolve(variant), resolve(reference),
                by=by, text=text, tokens=tokens, cancel=cancel,
            ):  # fmt: skip
                if isinstance(item, Scoring):
                    progress(item)
                else:
                    found = item
        except Stopped:
            raise typer.Exit(130) from None
        finally:
            progress.end()
    print(_table(found, variant, reference), end="")
    if output:
        rows = [{**asdict(part), "modules": " ".join(part.modules)} for part in found]
        text_out = (
            json.dumps([asdict(p) for p in found], indent=1)
            if output.suffix.lower() == ".json"
            else _csv(rows)
        )
        report.write_text(output.expanduser(), text_out)
        print(f"Wrote {output}", file=sys.stderr)


def _table(found: tuple, variant: str, reference: str) -> str:
    width = max(len(p.name) for p in found)
    lines = [
        f"{variant} against {reference}, one part quantized at a time, {found[0].tokens:,} tokens; KL in nats",
        f"{'part':{width}}  {'mean KL':>9}  {'±':>8}  {'maximum':>8}  agrees",
    ]
    lines += [
        f"{p.name:{width}}  {p.kl_mean:9.2g}  {p.kl_se if p.kl_se is not None else float('nan'):8.1g}  "
        f"{p.kl_max:8.2g}  {p.top1 * 100:5.1f} %"
        for p in found
    ]
    return "\n".join(lines) + "\n"


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
