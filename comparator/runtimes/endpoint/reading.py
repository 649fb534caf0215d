"""Pieces of a server's answer → token ids with the times at which they arrived, and log-probabilities by token id.

What a server sends is read with care: a field of another type counts as absent.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from comparator.core.endpoints import Endpoint
from comparator.runtimes.base import Choices
from comparator.runtimes.endpoint import problems

_TOKEN_ID = re.compile(r"token_id:(\d+)")  # how vLLM writes one where it is asked to
_ENDS = {"stop": "eos", "length": "length"}
_FAILED = ("abort", "error", "cancelled")  # SGLang's and vLLM's words for an answer that was given up


def choice_of(piece: dict[str, Any]) -> dict[str, Any]:
    """The one choice of an answer or a piece; {} for a piece without one (usage)."""
    choices = piece.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def text_of(choice: dict[str, Any]) -> str:
    """The text of a piece, thinking included, which some servers send apart."""
    messages = (choice.get("delta"), choice.get("message"))
    message = next((m for m in messages if isinstance(m, dict)), {})
    parts = [
        choice.get("text"),
        message.get("reasoning_content") or message.get("reasoning"),
        message.get("content"),
    ]
    return "".join(part for part in parts if isinstance(part, str))


def ids_of(choice: dict[str, Any]) -> list[int]:
    """The token ids of a piece, where the server gives them."""
    ids = choice.get("token_ids")
    return [i for i in ids if _is_id(i)] if isinstance(ids, list) else []


def finish_of(choice: dict[str, Any]) -> str | None:
    """How an answer ended, in our words; None while it goes on, and where the server gave it up."""
    reason = choice.get("finish_reason")
    return _ENDS.get(reason, "eos") if isinstance(reason, str) and reason and reason not in _FAILED else None


def prompt_tokens(piece: dict[str, Any]) -> int | None:
    count = _usage(piece).get("prompt_tokens")
    return count if _is_id(count) and count > 0 else None


def answer_tokens(piece: dict[str, Any]) -> int | None:
    """How many tokens the server counted in its answer."""
    count = _usage(piece).get("completion_tokens")
    return count if _is_id(count) and count > 0 else None


def cached_tokens(piece: dict[str, Any]) -> int:
    """How many of the prompt's tokens the server took from an earlier request."""
    details = _usage(piece).get("prompt_tokens_details")
    count = details.get("cached_tokens") if isinstance(details, dict) else None
    return count if _is_id(count) else 0


def _usage(piece: dict[str, Any]) -> dict[str, Any]:
    usage = piece.get("usage")
    return usage if isinstance(usage, dict) else {}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


@dataclass
class Answer:
    """One answer as it arrives. `ids` and `times_s` have one entry per token."""

    tokenizer: Any
    text: str = ""
    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    start_s: float = 0.0
    finish: str | None = None
    given: bool = False  # the ids are the server's own
    pieces: int = 0
    prompt_tokens: int | None = None
    cached: int = 0

    def add(self, at_s: float, piece: dict[str, Any]) -> list[tuple[int, float]]:
        """The tokens that came with it."""
        if not piece:
            self.start_s = at_s
            return []
        choice = choice_of(piece)
        before = len(self.ids)
        self.prompt_tokens = prompt_tokens(piece) or self.prompt_tokens
        self.cached = cached_tokens(piece) or self.cached
        text, ids = text_of(choice), ids_of(choice)
        self.text += text
        if ids:
            self.given = True
            self.ids += ids
        elif text and not self.given:
            self.ids = self.tokenizer(self.text, add_special_tokens=False)["input_ids"]
        self.pieces += bool(text or ids)
        self.finish = finish_of(choice) or self.finish
        end = self.tokenizer.eos_token_id
        if finish_of(choice) == "eos" and end is not None and self.ids[-1:] != [end]:
            self.ids.append(end)  # which servers keep to themselves
        del self.times_s[len(self.ids) :]
        self.times_s += [at_s] * (len(self.ids) - len(self.times_s))
        return [(token, at_s) for token in self.ids[before:]]

    def require_end(self, endpoint: Endpoint) -> None:
        """Raises `UserError` where the answer ended without saying how."""
        if self.finish is None:
            raise problems.cut(endpoint) if self.pieces else problems.not_the_api(endpoint)


class Vocabulary:
    """The ids of tokens that a server names by their text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    @cached_property
    def _ids(self) -> dict[str, int | None]:
        """By text; None where several tokens have the same."""
        ids: dict[str, int | None] = {}
        for token in range(len(self._tokenizer)):
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            ids[text] = None if text in ids else token
        return ids

    def id_of(self, entry: dict[str, Any]) -> int | None:
        """An entry's `id`, or the id of its `token`; None where it is not known for certain."""
        if _is_id(entry.get("id")):
            return entry["id"]
        text = entry.get("token")
        if not isinstance(text, str):
            return None
        if written := _TOKEN_ID.fullmatch(text):
            return int(written[1])
        return self._ids.get(text)

    def choices(self, choice: dict[str, Any]) -> list[Choices | None]:
        """By position what the server put first, with log-probabilities; None where the token is not known."""
        return [self._position(entry) for entry in _positions(choice.get("logprobs"))]

    def _position(self, entry: dict[str, Any]) -> Choices | None:
        """`entry`: the token itself, with the most likely ones under "top_logprobs"."""
        first, log_p = self.id_of(entry), {}
        for other in (entry, *_dicts(entry.get("top_logprobs"))):
            token, value = self.id_of(other), other.get("logprob")
            if token is not None and isinstance(value, (int, float)) and -math.inf < value <= 1e-3:
                log_p[token] = min(float(value), 0.0)
        return None if first is None else Choices(first, log_p)


def _positions(logprobs: Any) -> list[dict[str, Any]]:
    """Both ways of writing log-probabilities as one: chat's (and llama-server's), and that of /completions."""
    if not isinstance(logprobs, dict):
        return []
    if isinstance(content := logprobs.get("content"), list):
        return _dicts(content)
    tokens, own, tops = (logprobs.get(k) or [] for k in ("tokens", "token_logprobs", "top_logprobs"))
    if not all(isinstance(v, list) for v in (tokens, own, tops)):
        return []
    return [
        {"token": token, "logprob": p, "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]}
        for token, p, top in zip(tokens, own, tops, strict=False)
        if isinstance(top, dict)
    ]


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []
