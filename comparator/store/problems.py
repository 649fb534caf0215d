"""Why a saved comparison cannot be opened or changed."""

from __future__ import annotations

from comparator.core.errors import UserError


class NotFound(UserError):
    """The id has the right form, and no document here has it."""


class Deleted(UserError):
    """The comparison was deleted; its owner can bring it back."""


class NotYours(UserError):
    """Another owner's; only its owner may change it."""
