"""A checkpoint's tokenizer, without code from the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.sources import isolated
from comparator.sources.checkpoint import Checkpoint
from comparator.util import formatting
from comparator.util.line_process import LineProcess


def load_tokenizer(
    checkpoint: Checkpoint, cpu_s: float | None = None, where: LineProcess | None = None
) -> Any:
    """The checkpoint's tokenizer. Raises `UserError`.

    On a public server a stranger's runs in another process, which is `where`, and `cpu_s` is what all its calls together
    may compute.
    """
    if isolated.needed(checkpoint.revision):
        return isolated.IsolatedTokenizer(checkpoint, cpu_s, where)
    return own_tokenizer(checkpoint)


def own_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer itself, in this process. Raises `UserError` where it cannot be read."""
    try:
        return read_tokenizer(checkpoint.path)
    except Exception as error:
        raise UserError(
            f"The tokenizer of {checkpoint.source} cannot be read: {formatting.first_line(error, 200)}",
            "Check that the folder contains tokenizer.json or the files of a slow tokenizer.",
        ) from error


def read_tokenizer(path: Path) -> Any:
    """Imports transformers, and raises what it raises."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
