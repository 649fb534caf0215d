"""Visitors' data on a public server: read in a process of its own, with limits on time, memory and size.

Parquet and the formats of the Hub unpack to much more than a file has bytes, and their readers are not ours.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.deploy.limits import limits_of
from comparator.util import supervised

SECONDS = 60.0
MEMORY_BYTES = 6e9  # address space: pyarrow reserves more than it uses
_AT_ONCE = threading.BoundedSemaphore(2)


def file(path: Path, title: str, settings: Settings) -> list[dict[str, Any]]:
    """The rows of an uploaded file. Raises `UserError`, over a limit too."""
    return _call("_file", title, {"path": str(path.resolve()), "title": title}, settings)


def hub(repo: str, revision: str | None, split: str | None, settings: Settings) -> list[dict[str, Any]]:
    """The rows of a data set of the Hub, streamed. Raises `UserError`, over a limit and for a folder of the server too."""
    if Path(repo).exists() or ".." in repo:  # `datasets` would open it
        raise UserError(
            f"“{repo}” is not accepted: on a public server data comes from the Hub.", "Upload a file."
        )
    return _call("_hub", repo, {"repo": repo, "revision": revision, "split": split}, settings)


def check_system(samples: Sized, system: str | None, settings: Settings) -> None:
    """A system prompt stands before every sample: raises `UserError` where that makes more text than allowed."""
    most, count = limits_of(settings).max_training_characters, len(system or "") * len(samples)
    if most is not None and count > most:
        raise UserError(
            f"The system prompt has {len(system or ''):,} characters and is added to each of {len(samples):,} samples; "
            f"together the limit here is {most:,} (COMPARATOR_MAX_TRAINING_CHARACTERS).",
            "Shorten it.",
        )


def _call(name: str, title: str, argument: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    most = limits_of(settings).max_training_characters
    try:
        with _AT_ONCE:
            return supervised.call(
                f"{__name__}:{name}", argument | {"most": most}, seconds=SECONDS, memory_bytes=MEMORY_BYTES
            )
    except supervised.OverLimit as over:
        raise UserError(
            f"{title} cannot be read within this server's limits: {over.reason}.", "Use a part of it."
        ) from None


# ---------------------------------------------------------------- in the child


def _file(argument: dict[str, Any]) -> list[dict[str, Any]]:
    from comparator.training import data

    return _within(
        data.rows_of(Path(argument["path"]), argument["title"]), argument["title"], argument["most"]
    )


def _hub(argument: dict[str, Any]) -> list[dict[str, Any]]:
    from comparator.training import data

    rows = data.from_hub(argument["repo"], argument["revision"], argument["split"], streaming=True)
    return _within(rows, argument["repo"], argument["most"])


def _within(rows: Iterable[dict[str, Any]], title: str, most: int | None) -> list[dict[str, Any]]:
    """The rows, as long as they have no more characters than allowed; the first ones that have more end it."""
    taken, characters = [], 0
    for row in rows:
        characters += len(json.dumps(row, default=str, ensure_ascii=False))
        if most is not None and characters > most:
            raise UserError(
                f"{title} has more than {most:,} characters, the limit here (COMPARATOR_MAX_TRAINING_CHARACTERS).",
                "Use a part of it, or run Quant Comparator on your own machine.",
            )
        taken.append(row)
    return taken
