"""A model's license, by what its model card says."""

from __future__ import annotations

import re
from pathlib import Path

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources import hub, hub_files, naming
from comparator.sources.checkpoint import Checkpoint

_BUILTIN = "apache-2.0"
_CARD = "README.md"
_CARD_BYTES = 2**16  # metadata come first
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9._+-]{0,60})[\"']?[ \t]*$", re.MULTILINE)


def license_of(checkpoint: Checkpoint) -> str | None:
    """The Hub's name of the license (`apache-2.0`); None where no card names one. May fetch the card from the Hub."""
    try:
        named = naming.parse(checkpoint.source, get_settings())
        if named.kind == "builtin":
            return _BUILTIN
        folder = checkpoint.path
        if named.kind == "hub" and not (folder / _CARD).is_file():
            listing = hub.list_repo(named.text, checkpoint.revision, _silent)
            if _CARD in listing.files:
                folder = hub_files.fetch(listing, [_CARD], _silent, "")
    except UserError:  # the Hub cannot be reached
        folder = checkpoint.path
    return _named_in(folder / _CARD)


def _named_in(card: Path) -> str | None:
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as file:
        head = file.read(_CARD_BYTES)
    match = _LICENSE.search(head.split("\n---", 1)[0]) if head.startswith("---") else None
    return match[1] if match else None


def _silent(fraction: float | None, message: str) -> None:
    pass
