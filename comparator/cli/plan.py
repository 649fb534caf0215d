"""`plan`: what of a model fits on a card, estimated from its headers. Logic is in comparator/capacity/estimate.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from comparator.cli.options import AsJson, Quiet, notations, print_json
from comparator.core.errors import UserError

if TYPE_CHECKING:
    from comparator.capacity.estimate import Plan

EXAMPLES = """Examples:

  python -m comparator plan meta-llama/Llama-3.1-8B-Instruct \\
      --gpu "RTX 4090" --context 32k --users 4

  python -m comparator plan smollm2-135m -v bf16 -v nf4 --json

Exit code: 0 if a variant fits, 1 if none does, 2 for an invalid request."""


def plan(
    model: Annotated[str, typer.Argument(help="A built-in name, user/name@revision (only its headers are read), a folder or a GGUF file.")],
    gpu: Annotated[
        str | None,
        typer.Option(metavar="CARD", help="Its name (RTX 4090, H100 SXM …), or its memory and bandwidth: 24GB@1008GB/s. (default: this machine)"),
    ] = None,
    context: Annotated[str, typer.Option(metavar="N", help="Tokens of prompt and answer per user: 4096, 32k.")] = "4k",
    users: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that are decoded at once.")] = 1,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", "-v", metavar="NOTATION", autocompletion=notations, help="Variant; repeatable. (default: all that can be made of the model)"),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="graph: the captured step keeps a second KV cache; eager: it does not. (default: graph on CUDA)"),
    ] = None,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Estimate what fits: weights, KV cache, activations, the largest context, the roofline. Downloads no weights."""
    from comparator.backends import resolve
    from comparator.backends.transformers_loader import import_quietly
    from comparator.capacity import cards, estimate
    from comparator.cli.progress import Progress
    from comparator.core.settings import get_settings
    from comparator.deploy.limits import limits_of
    from comparator.sources import open_headers
    from comparator.util import quantities

    if decode not in (None, "graph", "eager"):
        raise UserError(f"There is no decode path “{decode}” to plan for.", "Write graph or eager.")
    variants, tokens = [resolve(name) for name in variant or ()], quantities.tokens(context)
    limits_of(get_settings()).check_source(model)
    import_quietly("torch", "transformers")
    card = cards.find(gpu)
    with Progress(silent=silent) as progress:
        checkpoint = open_headers(model, progress=progress.report)
    made = estimate.plan(checkpoint, card, tokens, users, variants, decode)
    if as_json:
        print_json(made.to_dict())
    else:
        print(_shown(made), end="")
    raise typer.Exit(0 if any(row.fits for row in made.rows) else 1)


def _shown(made: Plan) -> str:
    from rich.text import Text

    from comparator.capacity import words
    from comparator.cli.tables import plain_table, printable, to_text

    table = plain_table()
    for heading in words.HEADINGS:
        table.add_column(heading, justify="left" if heading in ("variant", "fits") else "right")
    for row in made.rows:
        if not row.error:
            table.add_row(*(Text(printable(cell)) for cell in words.cells(row)))
    lines = [*words.intro(made), ""]
    rest = ["", *(printable(line) for line in words.remarks(made))]
    return to_text(*(printable(line) for line in lines), table, *rest)
