"""Votes → win rates per column, of all visitors, of one, or of a judge model; and whether that agrees with people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comparator.core.result import Comparison
from comparator.core.votes import Judge, Judgement, Standing, Vote
from comparator.util import bradley_terry, stats


def standings(comparison: Comparison, votes: Sequence[Vote] | None = None) -> tuple[Standing, ...]:
    """The columns that were voted on, in the document's order. `votes`: some of them; None: all of the comparison's.

    The rate of two columns is their share of the votes, a tie or "both bad" as half; from three on it is the
    Bradley–Terry model's expected share against the other columns, so that it does not depend on whom a column met.
    """
    if votes is None:
        votes = comparison.votes.votes if comparison.votes else ()
    count = len(comparison.cells)
    wins = [[0.0] * count for _ in range(count)]
    for vote in votes:
        left = {"left": 1.0, "right": 0.0}.get(vote.choice, 0.5)
        wins[vote.left][vote.right] += left
        wins[vote.right][vote.left] += 1 - left
    return tuple(
        Standing(cell.label, *_counts(votes, number), rate.share, rate.low, rate.high)
        for number, (cell, rate) in enumerate(
            zip(comparison.cells, bradley_terry.win_rates(wins), strict=True)
        )
        if rate is not None
    )


def by_visitor(comparison: Comparison) -> dict[str, tuple[Standing, ...]]:
    """The standings of each visitor's own votes; who voted first comes first."""
    votes = comparison.votes.votes if comparison.votes else ()
    visitors = dict.fromkeys(v.visitor for v in votes)
    return {who: standings(comparison, [v for v in votes if v.visitor == who]) for who in visitors}


@dataclass(frozen=True)
class Agreement:
    """How often a judge's verdict is the human vote's, over `votes` votes on pairs that it judged.

    `interval`: Wilson's of the share, at 95 %. `kappa`: Cohen's, over the two columns and tie; None where it is not defined.
    """

    votes: int
    same: int
    interval: tuple[float, float]
    kappa: float | None


def judge_standings(comparison: Comparison, judge: Judge) -> tuple[Standing, ...]:
    """The standings by a judge's verdicts; pairs without a verdict are left out."""
    return standings(
        comparison, [Vote(j.prompt, j.left, j.right, j.choice, "") for j in judge.judgements if j.choice]
    )


def agreement(comparison: Comparison, judge: Judge) -> Agreement | None:
    """A judge beside the human votes; None where no vote is on a pair that it judged. "Both bad" is a tie."""
    verdicts = {_outcome(j)[0]: _outcome(j)[1] for j in judge.judgements if j.choice}
    votes = map(_outcome, comparison.votes.votes if comparison.votes else ())
    both = [(human, verdicts[pair]) for pair, human in votes if pair in verdicts]
    if not both:
        return None
    same = sum(human == verdict for human, verdict in both)
    return Agreement(len(both), same, stats.wilson(same, len(both)), stats.cohen_kappa(both))


def _outcome(of: Vote | Judgement) -> tuple[tuple[int, int, int], str]:
    """((prompt, lower column, higher column), which of them won: lower, higher or tie)."""
    low, high = sorted((of.left, of.right))
    winner = {"left": of.left, "right": of.right}.get(of.choice or "")
    return (of.prompt, low, high), "tie" if winner is None else "lower" if winner == low else "higher"


def _counts(votes: Sequence[Vote], column: int) -> tuple[int, int, int, int, int]:
    """(votes, won, lost, tied, both bad)."""
    own = [(v.left == column, v.choice) for v in votes if column in (v.left, v.right)]
    tied, bad = (sum(choice == c for _, choice in own) for c in ("tie", "bad"))
    won = sum(choice == ("left" if is_left else "right") for is_left, choice in own)
    return len(own), won, len(own) - won - tied - bad, tied, bad
