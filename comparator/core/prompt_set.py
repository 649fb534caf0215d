"""A set of prompts, and what columns answered: plain frozen dataclasses that pickle, part of the document's schema 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Message:
    role: str  # "user" or "assistant"
    content: str


@dataclass(frozen=True)
class SetPrompt:
    """One prompt of a set. `check` is a name in `comparator/comparison/prompts/checks.py`; `expected` is what it compares with.

    Where a user's turn follows another in `history`, each column's own answer stands between them: a scripted conversation.
    """

    id: str
    prompt: str  # the last turn, the user's
    system: str | None = None
    history: tuple[Message, ...] = ()  # the turns before it, the first of which is the user's
    expected: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # written below the prompt as A, B, C …
    check: str | None = None
    kind: str = ""

    @property
    def text(self) -> str:
        """The last turn as it is sent: with its choices."""
        if not self.choices:
            return self.prompt
        listed = "\n".join(f"{letter(n)}) {choice}" for n, choice in enumerate(self.choices))
        return f"{self.prompt}\n{listed}\nAnswer with the letter of the right choice."

    @property
    def own_turns(self) -> int:
        """How many turns before the last one a column answers itself."""
        messages = [*self.history, Message("user", self.text)]
        return sum(a.role == b.role == "user" for a, b in pairwise(messages))

    def conversation(self, answers: Sequence[str] = ()) -> tuple[Message, ...]:
        """The turns up to the next one that a column answers, which is its last. `answers`: its own so far, in order."""
        messages, unused = [], iter(answers)
        for message in (*self.history, Message("user", self.text)):
            if messages and messages[-1].role == message.role == "user":
                own = next(unused, None)
                if own is None:
                    break
                messages.append(Message("assistant", own))
            messages.append(message)
        return tuple(messages)

    @property
    def characters(self) -> int:
        return len(self.text) + len(self.system or "") + sum(len(m.content) for m in self.history)


def letter(number: int) -> str:
    """0 → A."""
    return chr(ord("A") + number)


@dataclass(frozen=True)
class PromptSet:
    name: str
    prompts: tuple[SetPrompt, ...]


@dataclass(frozen=True)
class SetAnswer:
    """What one column answered to one prompt, and how near it is to the reference, over the reference's answer.

    Attributes:
        passed: what the prompt's check says; None without a check.
        failed_why: why it did not pass.
        kl: mean KL(reference || column), nats. `at_least`: a lower bound, of a column without full logits.
        agreement: share of the reference's tokens that are this column's first choice too.
        first_difference: the first of those tokens that is not, from 0; None where all are.
        compared: how many of them were compared.
        near_tie: decoded in a batch: the first token that the prompt alone may get otherwise, since rounding differs.
        score: of a task's document, where its metric is no right or wrong.
        earlier: its own answers to earlier turns of a scripted conversation.
        error: why there is no answer.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: Literal["eos", "length", "stopped"] | None = None
    passed: bool | None = None
    failed_why: str = ""
    kl: float | None = None
    at_least: bool = False
    agreement: float | None = None
    first_difference: int | None = None
    compared: int = 0
    near_tie: int | None = None
    score: float | None = None
    earlier: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, as lm-evaluation-harness computes it. The tuples have an entry per column.

    Attributes:
        filter: what it takes the answer out of the text with; "none": nothing.
        documents: how many were scored.
        errors: standard errors of `values`.
        differences: mean over the documents of the column's value less the reference's, for metrics that are such a mean.
        difference_errors: standard errors of `differences`, which are of pairs.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    documents: int
    values: tuple[float | None, ...] = ()
    errors: tuple[float | None, ...] = ()
    differences: tuple[float | None, ...] = ()
    difference_errors: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class TaskRun:
    """What was asked of lm-evaluation-harness, with its version, and its scores. `total`: documents, those that were not reached
    included. `fewshot`: examples by task."""

    names: tuple[str, ...]
    harness: str
    limit: int | None = None
    total: int = 0
    fewshot: dict[str, int] = field(default_factory=dict)
    scores: tuple[TaskScore, ...] = ()


@dataclass(frozen=True)
class SetResult:
    """`answers[column][prompt]`, in the order of the document's cells and of `prompts`; None: not reached.

    `batch`: how many prompts were decoded at once at most. Latency figures are never from here: they come from rounds of
    the first prompt alone. `resumed`: how many answers are of an earlier run that was interrupted. `task`: the prompts are the
    documents of tasks; `passed` is then their first metric.
    """

    name: str
    prompts: tuple[SetPrompt, ...] = ()
    answers: tuple[tuple[SetAnswer | None, ...], ...] = ()
    batch: int = 1
    resumed: int = 0
    task: TaskRun | None = None
