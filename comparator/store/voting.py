"""Votes on saved comparisons. They lie in the sidecar, since the document never changes, and are part of what `load` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from comparator.comparison.standings import standings
from comparator.core.result import Comparison
from comparator.core.votes import Votes, fits
from comparator.store.files import Sidecar

if TYPE_CHECKING:
    from comparator.store.store import Store


def change_votes(store: Store, id: str, change: Callable[[Comparison], Votes]) -> Comparison:
    """Put what `change` makes of the comparison in place of its votes; returns the comparison with them.

    Whoever has the link may vote, so no owner is asked for. No other vote comes between reading and writing. Raises what
    `Store.load` and `change` raise, and `UserError` if the disk refuses.
    """

    def with_votes(sidecar: Sidecar) -> Sidecar:
        return replace(sidecar, votes=change(store.load(id)))

    store.load(id)  # if it has to come from the Hub, then before anybody is kept waiting
    store.update(id, with_votes)
    return store.load(id)


def separated(comparison: Comparison) -> tuple[Comparison, Votes | None]:
    """A document that is to be saved, and the votes that came with it."""
    votes = comparison.votes and replace(comparison.votes, totals=standings(comparison))
    return replace(comparison, votes=None), votes


def attached(comparison: Comparison, votes: Votes | None) -> Comparison:
    """A saved document with its votes; those that cannot be its own, from a damaged sidecar, are left out."""
    fitting = votes if votes and fits(votes, len(comparison.cells), comparison.prompt_count) else None
    return comparison if fitting is comparison.votes else replace(comparison, votes=fitting)
