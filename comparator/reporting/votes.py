"""What blind votes say of each column, as text."""

from __future__ import annotations

from collections.abc import Iterable

from comparator.comparison import ballots
from comparator.comparison.standings import by_visitor, standings
from comparator.core.result import Comparison
from comparator.core.votes import Standing
from comparator.util import formatting

HEAD = ("column", "votes", "won", "lost", "tied", "both bad", "win rate", "95 % interval")
RULE = (
    "A tie, or both bad, is half a win. Of two columns the rate is the share won, with Wilson's interval; from three on it is "
    "the Bradley–Terry model's expected share against the other columns. The interval takes votes as independent, and is of "
    "these prompts alone. Identical answers are not put to the vote and do not count."
)


def title(comparison: Comparison) -> str:
    """ "Blind votes: 14 by 2 visitors"; "" without a vote."""
    if comparison.votes is None or not comparison.votes.votes:
        return ""
    visitors = len({vote.visitor for vote in comparison.votes.votes})
    return f"Blind votes: {len(comparison.votes.votes):,} by {formatting.plural(visitors, 'visitor')}"


def rows(of: Iterable[Standing]) -> list[tuple[str, ...]]:
    """A line per column under `HEAD`."""
    return [
        (s.label, *(f"{n:,}" for n in (s.votes, s.won, s.lost, s.tied, s.bad)), percent(s.rate), interval(s))
        for s in of
    ]


def totals(comparison: Comparison) -> list[tuple[str, ...]]:
    """`rows` of all votes; empty without one."""
    return rows(standings(comparison))


def visitor_head(comparison: Comparison) -> tuple[str, ...]:
    return ("visitor", "votes", *(s.label for s in standings(comparison)))


def visitor_rows(comparison: Comparison, you: str = "") -> list[tuple[str, ...]]:
    """A line per visitor under `visitor_head`: each column's rate by that visitor's own votes. `you`: a pseudonym."""
    labels = [s.label for s in standings(comparison)]
    votes = comparison.votes.votes if comparison.votes else ()
    lines = []
    for number, (visitor, own) in enumerate(by_visitor(comparison).items(), 1):
        rates = {s.label: f"{percent(s.rate)} ({interval(s)})" for s in own}
        name = "you" if visitor == you else f"visitor {number}"
        lines.append(
            (
                name,
                f"{sum(v.visitor == visitor for v in votes):,}",
                *(rates.get(label, formatting.NONE) for label in labels),
            )
        )
    return lines


def extent_words(comparison: Comparison) -> str:
    """How much there is to vote on: "40 pairs of answers to 20 prompts; 6 more are identical"."""
    extent = ballots.extent(comparison)
    different = extent.pairs - extent.identical
    prompts = (
        f" to {formatting.plural(ballots.prompts(comparison), 'prompt')}" if comparison.prompt_set else ""
    )
    identical = f"; {extent.identical:,} more are identical" if extent.identical else ""
    return f"{formatting.plural(different, 'pair')} of answers{prompts}{identical}"


def percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def interval(standing: Standing) -> str:
    return f"{standing.low * 100:.0f} – {standing.high * 100:.0f} %"
