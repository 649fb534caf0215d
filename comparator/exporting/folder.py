"""The folder that an export writes: whole or absent, and nothing of a person's is overwritten."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comparator.core.errors import UserError
from comparator.util import atomic_dir

WHAT = "the checkpoint"


def check(output: Path, force: bool = False) -> None:
    """Before anything is made. Raises `UserError` for a place that cannot be written, and for a folder that is not empty,
    unless `force` and it holds a checkpoint, which is then replaced."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not force:
            raise UserError(f"{output} already exists.", "Choose a new folder; nothing is overwritten.")
        if not (output.is_dir() and _is_checkpoint(output)):
            raise UserError(
                f"{output} contains no checkpoint, so it is not replaced.",
                "Choose another folder, or remove it yourself.",
            )
    above = next(p for p in output.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{above} is not writable: {error.strerror}.", "Choose another folder.") from None


@contextmanager
def written(output: Path, need_bytes: int = 0, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes it when the block succeeds.

    need_bytes: about what will be written, compared with the free space first. Raises `UserError` for a full disk.
    """
    check(output, force)
    tmp: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_dir.check_space(output, need_bytes, WHAT, "--out")
        tmp = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
        whole = tmp / "whole"
        whole.mkdir()
        yield whole
        if output.exists():
            output.rename(tmp / "replaced")
        atomic_dir.commit(whole, output)
    except (OSError, shutil.Error) as error:
        # copytree gathers what the system said for each file, as text
        problem = atomic_dir.disk_problem(error, output, WHAT, "--out")
        raise problem or UserError(
            f"{output} cannot be written: {str(error)[:200]}", "Choose another folder."
        ) from error
    finally:
        if tmp is not None:
            shutil.rmtree(tmp, ignore_errors=True)


def copy(folder: Path, output: Path) -> None:
    """`folder` as `output`."""
    with written(output) as tmp:
        shutil.copytree(folder, tmp, dirs_exist_ok=True)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
