"""`sensitivity`: KL divergence with one part of the model quantized at a time."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from comparator.cli.options import Address, AsJson, Model, Quiet, Verbose, notations, print_json, use
from comparator.core.errors import UserError
from comparator.fidelity.recipe import RULE, Recipe

EXAMPLES = """Examples:

  python -m comparator sensitivity --variant nf4

  python -m comparator sensitivity --variant nf4 --by kind --tokens 1024 \\
      --output sensitivity.csv

  python -m comparator sensitivity --variant nf4 --target-size 150MB

Exit code: 0 on success, 2 for an invalid request, 130 after Ctrl-C."""


def sensitivity(
    variant: Annotated[
        str,
        typer.Option(
            "--variant", "-v", metavar="NOTATION", autocompletion=notations, help="The quantized variant."
        ),
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
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Propose which parts to keep in 16 bits so that the weights take at most this much, for example 130MB.",
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(metavar="B", help="The same, in bits per weight, for example 6.")
    ] = None,
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
    from comparator.core.settings import get_settings, parse_bytes
    from comparator.core.variant import Cell
    from comparator.engines import get_engine
    from comparator.fidelity import recipe
    from comparator.fidelity.sensitivity import measure
    from comparator.reporting import export

    target_bytes = None
    if target_size is not None or target_bits is not None:
        if None not in (target_size, target_bits):
            raise UserError("Both a size and bits per weight are given.", "Give only one of them.")
        recipe.check(resolve(variant))
        target_bytes = parse_bytes(target_size) if target_size else None
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
            made = refused = None
            if target_bytes is not None or target_bits is not None:
                try:
                    made = recipe.propose(
                        get_engine(), model or get_settings().model, resolve(variant), resolve(reference), parts, target_bytes,
                        target_bits,
                    )  # fmt: skip
                except UserError as problem:  # the measurement is shown all the same
                    refused = problem
        except Stopped:
            raise typer.Exit(130) from None
    listed = [asdict(p) for p in parts]
    if as_json:
        print_json({"parts": listed, "recipe": _plain(made)} if made else listed)
    else:
        print(_table(parts, variant, reference), end="")
        print(_recipe(made, variant, reference, model) if made else "", end="")
    if output:
        rows = [{**asdict(part), "modules": " ".join(part.modules)} for part in parts]
        whole = json.dumps(listed, indent=1) if output.suffix.lower() == ".json" else _csv(rows)
        export.write_text(output.expanduser(), whole)
        print(f"Wrote {output}", file=sys.stderr)
    if refused:
        raise refused


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


def _recipe(made: Recipe, variant: str, reference: str, model: str | None) -> str:
    """What to keep and why, and the command that measures it beside the others."""
    chosen = "" if model is None else f" -m {shlex.quote(model)}"
    return (
        f"\nKept in 16 bits: {', '.join(made.kept)}: {made.share * 100:.0f} % of the parts' divergences, summed.\n"
        f"{made.bytes / 1e6:,.1f} MB, {made.bits:.2f} bits per weight ({variant} {made.quantized_bytes / 1e6:,.1f} MB, {reference} "
        f"{made.reference_bytes / 1e6:,.1f} MB). {RULE}\n\n{made.variant.notation}\n\n"
        f"Compare it with the others:\n  python -m comparator run{chosen} -v {reference} -v {variant} -v "
        f"{shlex.quote(made.variant.notation)} --prompts everyday\nWrite it:\n  python -m comparator export{chosen} "
        f"{shlex.quote(made.variant.notation)} --out FOLDER\n"
    )


def _plain(made: Recipe) -> dict:
    return {**asdict(made), "variant": made.variant.notation}


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
