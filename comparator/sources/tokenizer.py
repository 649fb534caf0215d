"""A checkpoint's tokenizer, without code from the repository."""

from __future__ import annotations

from typing import Any

from comparator.core.errors import UserError
from comparator.sources.checkpoint import Checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Imports transformers. Raises `UserError` where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(checkpoint.path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(
            f"The tokenizer of {checkpoint.source} cannot be read: {str(error).splitlines()[0][:200]}",
            "Check that the folder holds tokenizer.json or the files of a slow tokenizer.",
        ) from error
