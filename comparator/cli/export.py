"""`export`: one variant → a folder, or a repo on the Hub, with a model card of what was measured."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import AsJson, Quiet, Verbose, print_json
from comparator.core.errors import Stopped
from comparator.core.result import Comparison

EXAMPLES = """Examples:

  python -m comparator export nf4 --out smollm2-nf4

  python -m comparator export nf4:dq -m user/model --out model-nf4 \\
      --from result.json

  python -m comparator export bf16 --adapter pirate --out pirate-merged

  python -m comparator export awq --out model-awq --push me/model-awq

Exit code: 0 on success, 2 for an invalid request, 130 after Ctrl-C."""


def export(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="For example nf4:dq; see `variants`.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="New folder for the checkpoint.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Model. (default: that of --from, else COMPARATOR_MODEL or smollm2-135m)",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", "-a", metavar="NAME", help="LoRA adapter, merged into the weights."),
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="ID|FILE",
            help="Comparison whose figures of this variant go into the model card: a saved one's id, or a .json file.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Also upload the folder to this Hub repo (needs HF_TOKEN)."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is in the folder already.")
    ] = False,
    verbose: Verbose = False,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a variant as a checkpoint, with its tokenizer and a model card."""
    from comparator import api
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.core.settings import get_settings
    from comparator.core.variant import parse_adapter
    from comparator.deploy.limits import limits_of
    from comparator.engines import get_engine
    from comparator.exporting import ExportRequest
    from comparator.exporting import export as carry_out
    from comparator.sources import hub_upload

    cell, comparison = api.cell(variant), _comparison(measured) if measured else None
    named = parse_adapter(adapter) if adapter else cell.adapter
    if push:
        hub_upload.check(push)
    request = ExportRequest(
        model or (comparison.model if comparison else get_settings().model), cell.variant,
        out.expanduser().absolute(), named, comparison, force=force,
    )  # fmt: skip
    limits = limits_of(get_settings())
    limits.check_source(request.model)
    limits.check_cell(request.cell)
    with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr, silent=silent) as shown:
        try:
            made = carry_out(get_engine(), request, cancel, shown.report)
        except Stopped:
            shown.end()
            print("Stopped; nothing was written.", file=sys.stderr)
            raise typer.Exit(130) from None
        if push:
            shown.report(None, f"uploading to {push}")
            address = hub_upload.push(
                made.folder, push, f"{cell.variant.notation}, exported by Quant Comparator", private=private
            )
    if as_json:
        facts = {"variant": request.cell.label, **asdict(made), "folder": str(made.folder)}
        print_json({**facts, "uploaded": address if push else None})
        return
    print(f"Wrote {request.cell.label} to {made.folder} ({made.bytes / 1e6:,.0f} MB)")
    print(f"Load it here with {made.notation}", file=sys.stderr)
    if made.loaded_by:
        print(f"The format is read by {', '.join(made.loaded_by)}.", file=sys.stderr)
    if push:
        print(f"Uploaded to {address}")


def _comparison(named: str) -> Comparison:
    """A document by its path, or a saved comparison by its id. Raises `UserError`."""
    from comparator.core import document
    from comparator.store import open_store

    if named.endswith(".json"):
        return document.read(Path(named).expanduser())
    with open_store() as store:
        return store.load(named)
