"""Who something belongs to on a public server: a random key in the visitor's browser, of which a digest is kept here."""

from __future__ import annotations

import hashlib


def digest(owner: str | None) -> str | None:
    """What is kept of an owner: enough to know them again, not enough to pose as them."""
    if owner is None:
        return None
    text = b"quant-comparator owner\0" + owner.encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]
