"""What blind votes and judge models say of each column, as text."""

from __future__ import annotations

from collections.abc import Iterable

from comparator.comparison import ballots
from comparator.comparison.standings import agreement, by_visitor, judge_standings, standings
from comparator.core.result import Comparison
from comparator.core.votes import Judge, Standing
from comparator.util import formatting

HEAD = ("variant", "votes", "won", "lost", "tied", "both bad", "win rate", "95 % interval")
RULE = (
    "A tie, or both bad, is half a win. With two variants the rate is the share won, with Wilson's interval; from three "
    "on it is "
    "the Bradley–Terry model's expected share against the other variants. The interval assumes independent votes, and "
    "covers these prompts only. Identical answers are not voted on and do not count."
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
    prompts = f" to {formatting.plural(comparison.prompt_count, 'prompt')}" if comparison.prompt_set else ""
    identical = f"; {extent.identical:,} more are identical" if extent.identical else ""
    return f"{formatting.plural(different, 'pair')} of answers{prompts}{identical}"


def percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def interval(standing: Standing) -> str:
    return f"{standing.low * 100:.0f} – {standing.high * 100:.0f} %"


# ---------------------------------------------------------------- judges

REASONS_HEAD = ("prompt", "A", "B", "verdict", "A and B", "exchanged")
JUDGE_RULE = (
    "A judge answers greedily, and twice for each pair, with the answers exchanged; where its two verdicts disagree, the pair "
    "is a tie. Its win rates are computed like those of votes. Kappa is Cohen's: 1 is full agreement, 0 what chance gives."
)


def judge_title(judge: Judge) -> str:
    """ "Judge bf16 of smollm2-135m: 40 pairs"."""
    return f"Judge {judge.column} of {judge.model}: {formatting.plural(len(judge.judgements), 'pair')}"


def judge_sentences(comparison: Comparison, judge: Judge) -> list[str]:
    """How often its orders disagreed, and how well it agrees with the human votes."""
    usable = [j for j in judge.judgements if j.choice]
    torn = sum(j.first != j.second for j in usable)
    missing = len(judge.judgements) - len(usable)
    if not usable:
        return ["It gave no verdict in the requested form. Use a larger model."]
    pairs = formatting.plural(len(usable), "pair")
    lines = [f"Its two orders disagreed on {torn:,} of {pairs}, which count as ties."]
    if missing:
        lines.append(f"{formatting.plural(missing, 'pair')} without a verdict, which are not counted.")
    one = agreement(comparison, judge)
    if one is None:
        return [*lines, "No human vote is on a pair that it judged."]
    low, high = one.interval
    kappa = "" if one.kappa is None else f"; kappa {one.kappa:.2f}"
    share = f"{percent(one.same / one.votes)} (95 % interval {low * 100:.0f} – {high * 100:.0f} %)"
    human = formatting.plural(one.votes, "human vote")
    return [*lines, f"It agrees with {one.same:,} of {human} on the same pairs: {share}{kappa}."]


def judge_totals(comparison: Comparison, judge: Judge) -> list[tuple[str, ...]]:
    """A line per column under `HEAD`, by the judge's verdicts; empty where it has none."""
    return rows(judge_standings(comparison, judge))


def reason_rows(comparison: Comparison, judge: Judge) -> list[tuple[str, ...]]:
    """A line per pair under `REASONS_HEAD`: what it decided, and why, in each order."""
    labels = [cell.label for cell in comparison.cells]
    prompts = comparison.prompt_set.prompts if comparison.prompt_set else ()
    lines = []
    for j in judge.judgements:
        names: dict[str | None, str] = {
            "left": labels[j.left], "right": labels[j.right], "tie": "tie", None: "no verdict"
        }  # fmt: skip
        each = (
            f"{names[c]}: {why}" if why else names[c]
            for c, why in zip((j.first, j.second), j.reasons, strict=True)
        )
        prompt = prompts[j.prompt].id if prompts else "the prompt"
        lines.append((prompt, labels[j.left], labels[j.right], names[j.choice], *each))
    return lines
