"""What a prompt set says of each column: checks passed, distance from the reference, and answers that flipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from comparator.core.prompt_set import SetAnswer, SetPrompt, SetResult, TaskRun
from comparator.core.result import Comparison
from comparator.util import formatting, stats

Flip = Literal["", "worse", "better"]  # right → wrong, wrong → right, against the reference

SUMMARY_HEAD = ("variant", "answered", "checks passed", "95 % interval", "KL, nats", "agrees", "right→wrong", "wrong→right",
                "p (McNemar)")  # fmt: skip
NOTE = (
    "Latencies are of the first prompt alone. The interval of the checks is Wilson's; ± is the standard error over prompts. "
    "Flips are against the reference, and p is McNemar's exact test of whether they go one way."
)


TASK_NOTE = (
    "The scores and their standard errors (±) are lm-evaluation-harness's own; ↑ higher is better, ↓ lower. A document passes where its task's first metric is 1; the "
    "interval is Wilson's. Flips are against the reference, and p is McNemar's exact test of whether they go one way. Latencies are of "
    "one prompt alone."
)


@dataclass(frozen=True)
class ColumnSummary:
    """`passed` of `checked`, with the 95 % interval of the share. `worse` and `better`: right → wrong and back, against the
    reference, and the exact p value of McNemar's test; None for the reference itself."""

    label: str
    answered: int
    passed: int
    checked: int
    interval: tuple[float, float] | None
    kl: stats.Mean | None
    at_least: bool
    agreement: stats.Mean | None  # over all tokens that were compared, `compared`
    compared: int
    worse: int | None = None
    better: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class Row:
    """One prompt. `answers` and `flips` in the order of the columns."""

    number: int  # in the set, from 0
    prompt: SetPrompt
    answers: tuple[SetAnswer | None, ...]
    flips: tuple[Flip, ...]

    @property
    def largest_kl(self) -> float:
        return max((a.kl or 0.0 for a in self.answers if a), default=0.0)


def summaries(comparison: Comparison) -> list[ColumnSummary]:
    """One per column, in their order; empty without a set."""
    table = rows(comparison)
    reference = reference_index(comparison)
    columns = []
    for number, cell in enumerate(comparison.cells if comparison.prompt_set else ()):
        answers = [a for row in table if (a := row.answers[number]) is not None and a.error is None]
        checked = [a for a in answers if a.passed is not None]
        passed = sum(bool(a.passed) for a in checked)
        compared = [a for a in answers if a.agreement is not None]
        flips = [row.flips[number] for row in table]
        worse, better = flips.count("worse"), flips.count("better")
        judged = reference is not None and number != reference and bool(checked)
        columns.append(
            ColumnSummary(
                cell.label, len(answers), passed, len(checked),
                stats.wilson(passed, len(checked)) if checked else None,
                stats.clustered([a.kl for a in answers if a.kl is not None]),
                any(a.at_least for a in answers),
                stats.clustered([a.agreement or 0.0 for a in compared], [a.compared for a in compared]),
                sum(a.compared for a in compared),
                *((worse, better, stats.mcnemar(worse, better)) if judged else ()),
            )
        )  # fmt: skip
    return columns


def rows(comparison: Comparison) -> list[Row]:
    """The prompts, where it matters first: checks that flip, then the largest KL divergence."""
    result, reference = comparison.prompt_set, reference_index(comparison)
    if result is None:
        return []
    table = []
    for number, prompt in enumerate(result.prompts):
        answers = tuple(column[number] for column in result.answers)
        base = answers[reference] if reference is not None else None
        table.append(Row(number, prompt, answers, tuple(_flip(a, base) for a in answers)))
    return sorted(table, key=lambda row: (not any(row.flips), -row.largest_kl))


def _flip(answer: SetAnswer | None, reference: SetAnswer | None) -> Flip:
    passed, theirs = (a.passed if a else None for a in (answer, reference))
    if passed is None or theirs is None or passed == theirs:
        return ""
    return "better" if passed else "worse"


def reference_index(comparison: Comparison) -> int | None:
    name = comparison.reference
    return next(
        (n for n, c in enumerate(comparison.cells) if name and (c.variant, c.adapter) == (name.variant, name.adapter)),
        None,
    )  # fmt: skip


# ---------------------------------------------------------------- as text


def title(comparison: Comparison) -> str:
    result = comparison.prompt_set
    if result is None:
        return ""
    if result.task:
        return _task_title(result, result.task)
    resumed = (
        f" ({formatting.plural(result.resumed, 'answer')} of an interrupted run)" if result.resumed else ""
    )
    ties = sum(a is not None and a.near_tie is not None for column in result.answers for a in column)
    batch = f", {result.batch} at once ({formatting.plural(ties, 'near tie')})" if result.batch > 1 else ""
    return f"Prompt set “{result.name}”: {formatting.plural(len(result.prompts), 'prompt')}{batch}{resumed}"


def _task_title(result: SetResult, task: TaskRun) -> str:
    shots = sorted(set(task.fewshot.values()))
    examples = (
        f"{' to '.join(map(str, {shots[0]: 0, shots[-1]: 0}))} examples each, " if shots and shots[-1] else ""
    )
    count = formatting.plural(len(result.prompts), "document")
    of = f" of {task.total:,}" if task.total > len(result.prompts) else ""
    resumed = (
        f", {formatting.plural(result.resumed, 'answer')} of an interrupted run" if result.resumed else ""
    )
    return f"Task “{result.name}”: {count}{of} ({examples}lm-evaluation-harness {task.harness}{resumed})"


def note(comparison: Comparison) -> str:
    """How the figures are meant."""
    return TASK_NOTE if comparison.prompt_set and comparison.prompt_set.task else NOTE


def score_table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(heading, a line for each metric of each task): the harness's scores ± standard errors, and below each other column's
    score the paired difference from the reference. No lines without a task."""
    task = comparison.prompt_set.task if comparison.prompt_set else None
    labels = [c.label for c in comparison.cells]
    lines = []
    for s in task.scores if task else ():
        better = {True: " ↑", False: " ↓", None: ""}[s.higher_is_better]
        name = f"{s.task} {s.metric}" + ("" if s.filter == "none" else f" ({s.filter})")
        lines.append((name + better, f"{s.documents:,}", *map(_figure, s.values, s.errors)))
        if any(d is not None for d in s.differences):
            base = "" if (n := reference_index(comparison)) is None else labels[n]
            paired = map(_signed, s.differences, s.difference_errors)
            lines.append((f"  difference from {base}, paired", "", *paired))
    return ("score", "documents", *labels), lines


def _figure(value: float | None, error: float | None) -> str:
    return formatting.NONE if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _signed(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:+.3g}" + ("" if error is None else f" ± {error:.2g}")


def summary_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A line per column under `SUMMARY_HEAD`."""
    total = len(comparison.prompt_set.prompts) if comparison.prompt_set else 0
    return [
        (
            s.label,
            f"{s.answered:,} of {total:,}",
            f"{s.passed:,} of {s.checked:,}" if s.checked else formatting.NONE,
            f"{s.interval[0] * 100:.0f} – {s.interval[1] * 100:.0f} %" if s.interval else formatting.NONE,
            ("≥ " if s.at_least and s.kl else "") + _mean(s.kl),
            _mean(s.agreement, 100, " %"),
            formatting.count(s.worse),
            formatting.count(s.better),
            formatting.NONE if s.p is None else f"{s.p:.2g}",
        )
        for s in summaries(comparison)
    ]


def _mean(mean: stats.Mean | None, scale: float = 1, unit: str = "") -> str:
    if mean is None:
        return formatting.NONE
    error = "" if mean.se is None else f" ± {mean.se * scale:.2g}"
    return f"{formatting.small(mean.mean * scale)}{error}{unit}"


def cell_words(answer: SetAnswer | None, flip: Flip = "") -> str:
    """An answer's figures: "failed (flipped) · KL 0.214 · agrees 87 % · differs at token 5"."""
    if answer is None:
        return formatting.NONE
    if answer.error is not None:
        return "error"
    parts: Sequence[str] = [
        "" if answer.passed is None else "passed" if answer.passed else "failed",
        "" if answer.kl is None else f"KL {'≥ ' if answer.at_least else ''}{formatting.small(answer.kl, 2)}",
        "" if answer.agreement is None else f"agrees {answer.agreement * 100:.0f} %",
        "" if answer.first_difference is None else f"differs at token {answer.first_difference + 1}",
    ]
    if answer.near_tie is not None:
        parts = [*parts, f"near tie at token {answer.near_tie + 1}"]
    if answer.score is not None:
        parts = [*parts, f"score {formatting.small(answer.score)}"]
    if flip:
        parts = [f"{parts[0]} (flipped)", *parts[1:]]
    return " · ".join(filter(None, parts)) or (
        formatting.plural(answer.tokens, "token") if answer.tokens else shortly(answer.text, 40)
    )


def why_words(answer: SetAnswer | None) -> str:
    """Why an answer did not pass, or why there is none; "" otherwise."""
    if answer is None:
        return "Not reached."
    return answer.error or answer.failed_why


def check_words(prompt: SetPrompt) -> str:
    """A prompt's check and what it compares with: "contains: Paris"."""
    if prompt.check is None:
        return ""
    return f"{prompt.check}: {' | '.join(prompt.expected)}" if prompt.expected else prompt.check


def shortly(text: str, most: int = 90) -> str:
    """One line of at most so many characters."""
    flat = " ".join(text[: most * 4].split())
    return flat if len(flat) <= most and len(text) <= most * 4 else f"{flat[: most - 1]}…"
