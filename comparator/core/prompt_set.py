"""A set of prompts, and what columns answered: plain frozen dataclasses that pickle, part of the document's schema 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    role: str  # "user" or "assistant"
    content: str


@dataclass(frozen=True)
class SetPrompt:
    """One prompt of a set. `check` is a name in `comparator/comparison/prompts/checks.py`; `expected` is what it compares with."""

    id: str
    prompt: str  # the last turn, the user's
    system: str | None = None
    history: tuple[Message, ...] = ()  # the turns before it, user's and assistant's alternating
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
    error: str | None = None


@dataclass(frozen=True)
class SetResult:
    """`answers[column][prompt]`, in the order of the document's cells and of `prompts`; None: not reached.

    `batch`: how many prompts were decoded at once at most. Latency figures are never from here: they come from rounds of
    the first prompt alone. `resumed`: how many answers are of an earlier run that was interrupted.
    """

    name: str
    prompts: tuple[SetPrompt, ...] = ()
    answers: tuple[tuple[SetAnswer | None, ...], ...] = ()
    batch: int = 1
    resumed: int = 0
