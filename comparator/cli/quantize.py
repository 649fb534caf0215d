"""`quantize`: a full-precision model → a GPTQ checkpoint that plain transformers loads."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from comparator.types import Problem, Stopped

EXAMPLES = """Examples:

  python -m comparator quantize --output smollm2-gptq

  python -m comparator quantize -m user/model -v gptq:4bit,g128,desc_act --calibration notes.txt -o model-gptq

  python -m comparator quantize -m user/model -v gptq:8bit --calibration c4 -o model-gptq --push-to-hub me/model-gptq

What was quantized before is in the cache and is copied from there. Exit code: 0, 2 for a request that is wrong or
cannot be met, 130 after Ctrl-C."""


def quantize(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; a new one.")
    ],
    variant: Annotated[
        str,
        typer.Option(
            "--variant", "-v", metavar="NOTATION", help="How: gptq:4bit,g64,desc_act … `variants` lists it."
        ),
    ] = "gptq",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The full-precision model. (default: COMPARATOR_MODEL, else smollm2-135m)"
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Calibration text: a text file, .json or .jsonl with a list of texts, c4, or wikitext2. "
            "(default: the text we ship)",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the folder to this Hub repo too (HF_TOKEN).")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries log.")] = False,
) -> None:
    """Quantize a model with GPTQ and write a checkpoint that plain transformers loads."""
    from comparator.cli.progress import Progress, quiet, stoppable
    from comparator.settings import get_settings

    output = output.expanduser().absolute()
    _check_output(output)
    _check_repo(push_to_hub)
    asked = _variant(variant, calibration)
    with quiet(verbose) as stderr, stoppable() as cancel:
        shown = Progress(stderr)

        def told(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            shown.status(message, "" if fraction is None else f" {fraction:.0%}")

        try:
            exact = carry_out(model or get_settings().model, asked, output, told, shown.line)
            if push_to_hub:
                told(None, f"uploading to {push_to_hub}")
                _upload(output, push_to_hub)
        except Stopped:
            shown.end()
            print("Stopped; nothing was kept.", file=sys.stderr)
            raise typer.Exit(130) from None
        finally:
            shown.end()
    print(f"Wrote {exact} to {output}")
    print(f"Compare it:  python -m comparator run -v bf16 -v gptq@{output} -p “…”", file=sys.stderr)
    if push_to_hub:
        print(f"Uploaded to https://huggingface.co/{push_to_hub}")


def carry_out(
    model: str, asked, output: Path, told: Callable[[float | None, str], None], line: Callable[[str], None]
) -> str:
    """Make the checkpoint and copy it to `output`, whole or not at all; returns the variant's full notation.

    Raises `Problem`, and what `told` raises.
    """
    from comparator.backends import backend_for
    from comparator.sources import open_checkpoint

    checkpoint = open_checkpoint(model, progress=told)
    backend = backend_for(asked)
    if reason := backend.unavailable():
        raise Problem(f"gptq cannot be used here: {reason}.", "Install it.")
    exact = backend.complete(asked, checkpoint, told)
    line(f"{checkpoint.source} ({checkpoint.parameters / 1e6:,.0f} M parameters) → {exact.notation}")
    for name in ready_made(checkpoint.source):
        line(f"Ready-made on the Hub: {name}  (load it with gptq@{name}; Ctrl-C stops here)")
    backend.silence()
    from comparator.pool import pick_device

    folder = backend.make(checkpoint, exact, pick_device(), told)
    told(1.0, f"copying to {output}")
    copy(folder, output)
    return exact.notation


def ready_made(source: str) -> list[str]:
    """GPTQ repos of this model that the Hub knows, at most three; [] where it cannot be reached."""
    from comparator.sources import search_hub

    if source.startswith(("/", ".", "~")):
        return []
    name = source.partition("@")[0].rpartition("/")[2]
    return [found for found in search_hub(f"{name} GPTQ", limit=3) if "gptq" in found.lower()]


def copy(folder: Path, output: Path) -> None:
    """`folder` as `output`, complete or absent. Raises `Problem` where it cannot be written."""
    from comparator.cache import disk_problem

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
        raise problem or Problem(
            f"{output} cannot be written: {str(error)[:200]}", "Choose another folder."
        ) from error
    finally:
        if tmp is not None:
            shutil.rmtree(tmp, ignore_errors=True)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Problem(f"{output} is there already.", "Name a new folder: nothing is overwritten.")
    above = next(p for p in output.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise Problem(f"{above} cannot be written to: {error.strerror}.", "Choose another folder.") from None


def _check_repo(repo: str | None) -> None:
    if repo is None:
        return
    import re

    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise Problem(f"“{repo}” is not the name of a Hub repo.", "It looks like user/name.")
    if not get_token():
        raise Problem(
            "Uploading needs a token.", "Set HF_TOKEN to a token that may write, or leave --push-to-hub out."
        )


def _variant(notation: str, source: str | None):
    from comparator.backends import resolve
    from comparator.gptq.calibration import take_in

    variant = resolve(notation)
    if variant.method != "gptq" or variant.source:
        raise Problem(
            f"quantize makes GPTQ checkpoints; {variant.notation} is not one to be made.",
            "bitsandbytes methods quantize as they load and need no checkpoint."
            if not variant.source
            else "Leave out the @ and what follows.",
        )
    return take_in(variant, source) if source else variant


def _upload(folder: Path, repo: str) -> None:
    """Raises `Problem` in words of ours: the library's carry the request, and with it more than a log should hold."""
    from huggingface_hub import HfApi

    from comparator.sources import hub_problems

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="GPTQ, made with Quant Comparator")
    except Exception as error:
        problem = hub_problems.explain(error, repo, None)
        raise Problem(f"{problem.problem} The checkpoint lies in {folder}.", problem.advice) from None
