"""`quantize`: a full-precision model → a quantized checkpoint that plain transformers loads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import AsJson, Quiet, Verbose, notations, print_json
from comparator.core.errors import Stopped, UserError

EXAMPLES = """Examples:

  python -m comparator quantize --output smollm2-gptq

  python -m comparator quantize -m user/model -v gptq:4bit,g128,desc_act \\
      --calibration notes.txt -o model-gptq

  python -m comparator quantize -m user/model -v gptq:8bit --calibration c4 \\
      -o model-gptq --push-to-hub me/model-gptq

Checkpoints quantized before are copied from the cache.

Exit code: 0 on success, 2 for an invalid request, 130 after Ctrl-C."""


def quantize(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="New folder for the checkpoint.")
    ],
    variant: Annotated[
        str,
        typer.Option(
            "--variant",
            "-v",
            metavar="NOTATION",
            autocompletion=notations,
            help="For example gptq:4bit,g64,desc_act; see `variants`.",
        ),
    ] = "gptq",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Full-precision model. (default: COMPARATOR_MODEL or smollm2-135m)",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Calibration text: a text file, .json or .jsonl with a list of texts, c4 or wikitext2. "
            "(default: the bundled text)",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Also upload the folder to this Hub repo (needs HF_TOKEN)."),
    ] = None,
    verbose: Verbose = False,
    silent: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and write a checkpoint that plain transformers loads."""
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.core.settings import get_settings
    from comparator.exporting import folder as exporting
    from comparator.sources import hub_upload

    output = output.expanduser().absolute()
    exporting.check(output)
    if push_to_hub:
        hub_upload.check(push_to_hub)
    requested = _variant(variant, calibration)
    with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr, silent=silent) as shown:

        def on_progress(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            shown.report(fraction, message)

        try:
            exact = carry_out(model or get_settings().model, requested, output, on_progress, shown.remark)
            if push_to_hub:
                on_progress(None, f"uploading to {push_to_hub}")
                address = hub_upload.push(output, push_to_hub, f"{exact}, made with Quant Comparator")
        except Stopped:
            shown.end()
            print("Stopped; nothing was written.", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        loaded = f"{requested.method}@{output}"
        uploaded = address if push_to_hub else None
        print_json({"variant": exact, "folder": str(output), "notation": loaded, "uploaded": uploaded})
        return
    print(f"Wrote {exact} to {output}")
    print(
        f"Compare:  python -m comparator run -v bf16 -v {requested.method}@{output} -p “…”", file=sys.stderr
    )
    if push_to_hub:
        print(f"Uploaded to {address}")


def carry_out(
    model: str,
    requested,
    output: Path,
    on_progress: Callable[[float | None, str], None],
    line: Callable[[str], None],
) -> str:
    """Quantize the model and copy the checkpoint to `output`, completely or not at all.

    Returns the variant's full notation. Raises `UserError`, and whatever `on_progress` raises.
    """
    from comparator.backends import backend_for
    from comparator.deploy.limits import check_source
    from comparator.exporting import folder as exporting
    from comparator.sources import open_checkpoint

    check_source(model)
    checkpoint = open_checkpoint(model, progress=on_progress)
    backend = backend_for(requested)
    if reason := backend.unavailable(requested):
        raise UserError(f"{requested.method} cannot be used here: {reason}.", "Install it.")
    exact = backend.complete(requested, checkpoint, on_progress)
    line(f"{checkpoint.source} ({checkpoint.parameters / 1e6:,.0f} M parameters) → {exact.notation}")
    for name in ready_made(checkpoint.source, requested.method):
        line(f"Already on the Hub: {name}  (load it with {requested.method}@{name}; Ctrl-C stops)")
    backend.silence()
    from comparator.engine.placement import pick_device

    folder = backend.make(checkpoint, exact, pick_device(), on_progress)
    on_progress(1.0, f"copying to {output}")
    exporting.copy(folder, output)
    return exact.notation


def ready_made(source: str, method: str) -> list[str]:
    """Repos of this model in `method` that the Hub knows, at most three; [] where it cannot be reached."""
    from comparator.sources import search_hub

    if source.startswith(("/", ".", "~")):
        return []
    name = source.partition("@")[0].rpartition("/")[2]
    return [repo for repo in search_hub(f"{name} {method.upper()}", limit=3) if method in repo.lower()]


def _variant(notation: str, source: str | None):
    from comparator.backends import backend_for, methods, resolve

    variant = resolve(notation)
    if not backend_for(variant).makes_checkpoints or variant.source:
        makers = ", ".join(name for name, (backend, _) in methods().items() if backend.makes_checkpoints)
        raise UserError(
            f"quantize cannot make a checkpoint of {variant.notation}, only of {makers} variants.",
            "The others are made from full precision while they load and need no checkpoint."
            if not variant.source
            else "Remove the @ and the source after it.",
        )
    return backend_for(variant).with_calibration(variant, source) if source else variant
