"""Who something belongs to on a public server: a random key in the visitor's browser, of which a digest is kept here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

from comparator.store.files import Sidecar
from comparator.store.problems import NotYours


def digest(owner: str | None) -> str | None:
    """What is kept of an owner: enough to know them again, not enough to pose as them."""
    if owner is None:
        return None
    text = b"quant-comparator owner\0" + owner.encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]


def owned(public: bool, owner: str | None, **values) -> Callable[[Sidecar], Sidecar]:
    """A change of a sidecar that is the owner's alone; it raises `NotYours` for anybody else. Not public: anybody's."""

    def change(sidecar: Sidecar) -> Sidecar:
        if public and (owner is None or sidecar.owner != digest(owner)):
            raise NotYours(
                "This comparison belongs to someone else.", "Run it here to get a result of your own."
            )
        return replace(sidecar, **values)

    return change
