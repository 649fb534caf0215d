"""A conversation → the text that a model's chat template makes of it, rendered in a process of its own."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import Any

from comparator.core.errors import UserError
from comparator.core.request import ChatTemplate
from comparator.decoding import template_process

CPU_S = 5  # that a template may compute for
WALL_S = 15.0  # on a busy machine, starting included
BYTES = 1 << 30  # of address space
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_NO_SYSTEM = "Leave the system prompt empty, or write it at the beginning of the prompt."
# What a model puts around its thinking: (opening, closing).
TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


def render(
    tokenizer: Any,
    prompt: str,
    system: str | None,
    chosen: ChatTemplate,
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """The prompt as the last turn of a conversation, ready for the answer. `history`: (role, content) of the turns before it.

    Raises `UserError` for a template or variable that does not exist, a system prompt that the template refuses or leaves
    out, and a template that raises, takes too long or too much memory.
    """
    user = [{"role": role, "content": text} for role, text in (*history, ("user", prompt))]
    conversations = [[{"role": "system", "content": system}, *user], user] if system else [user]
    template = _template(tokenizer, chosen.name)
    result = _rendered(_request(tokenizer, template, conversations, True, chosen.variables), date.today())
    _check_variables(chosen.variables, template, result["variables"])
    first, plain = result["texts"][0], result["texts"][-1]
    if error := plain.get("error"):
        raise UserError(
            f"The model's chat template refused this conversation: {error}", "Turn the chat template off."
        )
    if error := first.get("error"):
        raise UserError(f"The model's chat template refused the system prompt: {error}", _NO_SYSTEM)
    if system and first == plain:
        raise UserError("The model's chat template ignores the system prompt.", _NO_SYSTEM)
    return first["text"]


def written(tokenizer: Any, messages: list[dict], asking: bool) -> str:
    """A whole conversation by the default template, for training. `asking`: end with what begins an answer. Raises like
    `render`."""
    messages = [{name: value for name, value in m.items() if value is not None} for m in messages]
    request = _request(tokenizer, _template(tokenizer, None), [messages], asking, {})
    text = _rendered.__wrapped__(request, date.today())["texts"][
        0
    ]  # a data set's conversations do not repeat
    if error := text.get("error"):
        raise UserError(
            f"The model's chat template refused a conversation: {error[:200]}",
            "Check the order of the roles (most want user and assistant in turn), or remove the system prompt.",
        )
    return text["text"]


def _request(
    tokenizer: Any, template: str, conversations: list, asking: bool, variables: dict[str, Any]
) -> str:
    fixed = {
        **tokenizer.special_tokens_map,
        "tools": None,
        "documents": None,
        "add_generation_prompt": asking,
    }
    return json.dumps(
        {"template": template, "conversations": conversations, "fixed": fixed, "variables": variables, "cpu_s": CPU_S,
         "bytes": BYTES}, default=str,
    )  # fmt: skip


def opened(text: str) -> str:
    """The thinking tag that a rendered template ends with, so that the model's answer begins inside; "" for none."""
    end = text.rstrip()
    return next((opening for opening, _ in TAGS if end.endswith(opening)), "")


def _template(tokenizer: Any, name: str | None) -> str:
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        templates = {"default": templates}
    chosen = templates.get(name or "default")
    if chosen is None:
        problem = (
            f"has no template “{name}”" if name else "has several templates and none of them is the default"
        )
        raise UserError(f"This model {problem}.", f"Name one of {', '.join(sorted(templates))}.")
    return chosen


def _check_variables(variables: dict[str, Any], template: str, reads: list[str]) -> None:
    for name in variables:
        if name in RESERVED:
            raise UserError(f"The template variable “{name}” is filled in here.", "Leave it out.")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            names = [n for n in reads if n not in RESERVED]
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            known = f"It reads {', '.join(names)}." if names else "It reads none."
            raise UserError(f"The model's chat template reads no variable “{name}”.", f"{meant}{known}")


@lru_cache(maxsize=32)
def _rendered(request: str, today: date) -> dict[str, Any]:
    """The program's answer. `today` is part of the key: templates may print the date."""
    advice = "Turn the chat template off to send the raw text."
    try:
        answer = template_process.process.ask(request.encode(), WALL_S)
    except TimeoutError:
        raise UserError(f"The model's chat template took longer than {WALL_S:.0f} s.", advice) from None
    try:
        result = json.loads(answer)
    except ValueError:  # ended by the kernel
        raise UserError(
            f"The model's chat template took too long, more than {CPU_S} s of computing, or too much memory.",
            advice,
        ) from None
    if "error" in result:
        raise UserError(f"The model's chat template cannot be used: {result['error']}", advice)
    return result
