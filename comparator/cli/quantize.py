"""`quantize`: a full-precision model → a quantized checkpoint that plain transformers loads."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from comparator.cli.options import Verbose
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
            "--variant", "-v", metavar="NOTATION", help="For example gptq:4bit,g64,desc_act; see `variants`."
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
) -> None:
    """Quantize a model and write a checkpoint that plain transformers loads."""
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.core.settings import get_settings

    output = output.expanduser().absolute()
    _check_output(output)
    _check_repo(push_to_hub)
    requested = _variant(variant, calibration)
    with quiet(verbose) as stderr, stoppable() as cancel, Progress(stderr) as shown:

        def on_progress(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            shown.report(fraction, message)

        try:
            exact = carry_out(model or get_settings().model, requested, output, on_progress, shown.line)
            if push_to_hub:
                on_progress(None, f"uploading to {push_to_hub}")
                _upload(output, push_to_hub, exact)
        except Stopped:
            shown.end()
            print("Stopped; nothing was written.", file=sys.stderr)
            raise typer.Exit(130) from None
    print(f"Wrote {exact} to {output}")
    print(
        f"Compare:  python -m comparator run -v bf16 -v {requested.method}@{output} -p “…”", file=sys.stderr
    )
    if push_to_hub:
        print(f"Uploaded to https://huggingface.co/{push_to_hub}")


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
    from comparator.sources import open_checkpoint

    check_source(model)
    checkpoint = open_checkpoint(model, progress=on_progress)
    backend = backend_for(requested)
    if reason := backend.unavailable():
        raise UserError(f"{requested.method} cannot be used here: {reason}.", "Install it.")
    exact = backend.complete(requested, checkpoint, on_progress)
    line(f"{checkpoint.source} ({checkpoint.parameters / 1e6:,.0f} M parameters) → {exact.notation}")
    for name in ready_made(checkpoint.source, requested.method):
        line(f"Already on the Hub: {name}  (load it with {requested.method}@{name}; Ctrl-C stops)")
    backend.silence()
    from comparator.engine.placement import pick_device

    folder = backend.make(checkpoint, exact, pick_device(), on_progress)
    on_progress(1.0, f"copying to {output}")
    copy(folder, output)
    return exact.notation


def ready_made(source: str, method: str) -> list[str]:
    """Repos of this model in `method` that the Hub knows, at most three; [] where it cannot be reached."""
    from comparator.sources import search_hub

    if source.startswith(("/", ".", "~")):
        return []
    name = source.partition("@")[0].rpartition("/")[2]
    return [repo for repo in search_hub(f"{name} {method.upper()}", limit=3) if method in repo.lower()]


def copy(folder: Path, output: Path) -> None:
    """`folder` as `output`, complete or absent. Raises `UserError` where it cannot be written."""
    from comparator.util.atomic_dir import disk_problem

    tmp: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
        shutil.copytree(folder, tmp / "whole")
        if output.exists():
            output.rmdir()  # checked to be empty
        (tmp / "whole").rename(output)
    except (OSError, shutil.Error) as error:
        # copytree gathers what the system said for each file, as text
        problem = disk_problem(error, output, "the checkpoint")
        raise problem or UserError(
            f"{output} cannot be written: {str(error)[:200]}", "Choose another folder."
        ) from error
    finally:
        if tmp is not None:
            shutil.rmtree(tmp, ignore_errors=True)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists.", "Choose a new folder; nothing is overwritten.")
    above = next(p for p in output.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{above} is not writable: {error.strerror}.", "Choose another folder.") from None


def _check_repo(repo: str | None) -> None:
    if repo is None:
        return
    import re

    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"“{repo}” is not the name of a Hub repo.", "Use the form user/name.")
    if not get_token():
        raise UserError(
            "Uploading needs a token.", "Set HF_TOKEN to a token with write access, or omit --push-to-hub."
        )


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


def _upload(folder: Path, repo: str, notation: str) -> None:
    """Raises `UserError` without the library's message, which contains the request and thus the token."""
    from huggingface_hub import HfApi

    from comparator.sources import hub_problems

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"{notation}, made with Quant Comparator"
        )
    except Exception as error:
        problem = hub_problems.explain(error, repo, None)
        raise UserError(f"{problem.problem} The checkpoint is in {folder}.", problem.advice) from None
