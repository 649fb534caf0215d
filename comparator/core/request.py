"""The request of a comparison, with decoding settings and the evaluation text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from comparator.core.errors import UserError
from comparator.core.prompt_set import PromptSet
from comparator.core.variant import Cell

BUILTIN_MODEL = "smollm2-135m"
AUTOMATIC_ROUNDS = 3  # runs of each column where `repeats` is 0 and
SHORT_ROUND_S = 10.0  # the first round took less than this


@dataclass(frozen=True)
class GenerationSettings:
    """How to decode; the same for every column. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    repeats: int = 0  # runs per column; 0: AUTOMATIC_ROUNDS where the first took under SHORT_ROUND_S, else 1
    decode: str = "auto"  # auto | both (auto, and eager too) | eager | graph | compiled


@dataclass(frozen=True)
class ChatTemplate:
    """Which of the model's chat templates makes the prompt, and the variables that it gets beside the messages.

    `name` None: the default one. `variables` are text, numbers, booleans or None by name (`enable_thinking`).
    """

    name: str | None = None
    variables: dict[str, str | int | float | bool | None] = field(default_factory=dict)


DEFAULT_TEMPLATE = ChatTemplate()


def parse_variables(pairs: Iterable[str]) -> dict[str, Any]:
    """`enable_thinking=false` → {"enable_thinking": False}: values as in JSON, anything else is text."""
    variables: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(
                f"“{pair[:80]}” is not a template variable.",
                "Write NAME=VALUE, for example enable_thinking=false.",
            )
        try:
            value = json.loads(text.lower() if text in ("True", "False") else text)
        except (ValueError, RecursionError):
            value = text
        finite = not isinstance(value, float) or abs(value) < float("inf")
        variables[name] = value if isinstance(value, (str, int, float, bool, type(None))) and finite else text
    return variables


def written_variables(variables: dict[str, Any]) -> list[str]:
    """The inverse of `parse_variables`."""
    return [
        f"{name}={value}" if isinstance(value, str) and parse_variables([f"{name}={value}"]) == {name: value}
        else f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in variables.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class EvalSettings:
    """The text that fidelity is measured on, and its windows: `context` tokens, `stride` new ones. None: bundled text."""

    text: str | None = None
    name: str = "built-in text"
    context: int = 512
    stride: int = 512


@dataclass(frozen=True)
class TaskRequest:
    """Tasks of lm-evaluation-harness: names that it knows, and folders with the YAML of tasks. `limit`: documents of each,
    from the first; `fewshot`: examples before each document. None: all, and what the task says."""

    names: tuple[str, ...]
    limit: int | None = None
    fewshot: int | None = None


@dataclass(frozen=True)
class Request:
    """One comparison as requested."""

    model: str
    cells: tuple[Cell, ...]
    prompt: str
    system: str | None = None
    chat: bool | None = None  # None: the chat template where the model has one
    template: ChatTemplate = field(default_factory=ChatTemplate)
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    reference: Cell | None = None  # None: the most precise column
    fidelity: Literal["none", "prompt", "text"] = "prompt"
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    evict: bool = True  # unload the least recently used variants to free memory
    max_memory: str | None = None  # "0=6GiB,cpu=20GiB": accelerate's device map
    prompts: PromptSet | None = None  # all go through each column; `prompt` is the first, for the latencies
    task: TaskRequest | None = None  # in place of `prompts`; an empty `prompt` is then the first document's
    batch: int = 1  # prompts of the set that are decoded at once, where a column's runtime can
    resume: bool = True  # take up an interrupted run of the same set
    parallel: bool = False  # columns on different devices of a cluster at the same time
