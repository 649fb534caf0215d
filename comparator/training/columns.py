"""Detects a column's role: chat messages, prompt and completion, or plain text; by name first, then by content."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comparator.core.errors import UserError
from comparator.training.types import FORMS, DataSource, Form

_NAMES = {
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue"),
    "prompt": ("prompt", "instruction", "question", "query", "input", "user"),
    "completion": ("completion", "response", "answer", "output", "assistant", "target", "chosen"),
    "text": ("text", "content", "document", "body"),
}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True)
class Columns:
    """`roles`: (role, column). `context`: a second column of the prompt (Alpaca's `input`)."""

    form: Form
    roles: tuple[tuple[str, str], ...]
    context: str | None = None

    def name(self, role: str) -> str:
        return dict(self.roles)[role]


def recognize(names: list[str], rows: list[dict[str, Any]], data: DataSource) -> Columns:
    """Columns of the data from its own choice, or detected. Raises `UserError` with the columns it has and the known ones."""
    named = dict(data.columns)
    for role, name in named.items():
        if role not in _NAMES:
            raise UserError(f"There is no role “{role}” for a column.", f"The roles are {', '.join(_NAMES)}.")
        if name not in names:
            raise UserError(f"{data.title} has no column “{name}”.", f"Its columns are {_listed(names)}.")
    low = {n.strip().lower(): n for n in reversed(names)}

    def find(role: str, besides: Iterable[str] = ()) -> str | None:
        if role in named:
            return named[role]
        return next((low[n] for n in _NAMES[role] if n in low and low[n] not in besides), None)

    form = data.form or _form_of(named)
    messages, prompt, text = find("messages"), find("prompt"), find("text")
    completion = find("completion", (prompt,) if prompt else ())
    if form in (None, "chat") and messages and (form or _holds_messages(rows, messages)):
        return Columns("chat", (("messages", messages),))
    if form in (None, "prompt") and prompt and completion:
        extra = low.get("input") if "instruction" in low and prompt == low["instruction"] else None
        roles = (("prompt", prompt), ("completion", completion))
        return Columns("prompt", (*roles, ("context", extra)) if extra else roles, extra)
    if form in (None, "text") and text:
        return Columns("text", (("text", text),))
    if form is None and len(names) == 1 and isinstance(rows[0].get(names[0]), str):
        return Columns("text", (("text", names[0]),))
    as_form = f" as {FORMS[form]}" if form else ""
    raise UserError(
        f"The columns of {data.title} are not recognized{as_form}: {_listed(names)}.",
        "Recognized are messages (chat), prompt and completion (also instruction/output, question/answer), or text. "
        "Rename the columns, or say which is which: prompt=COLUMN, completion=COLUMN.",
    )


def _form_of(roles: dict[str, str]) -> Form | None:
    if "messages" in roles:
        return "chat"
    if "prompt" in roles or "completion" in roles:
        return "prompt"
    return "text" if "text" in roles else None


def _listed(names: list[str]) -> str:
    quoted = [f"“{n[:40]}”" for n in names[:12]]
    return ", ".join(quoted) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _holds_messages(rows: list[dict[str, Any]], name: str) -> bool:
    return any(isinstance(as_messages(row.get(name)), list) for row in rows[:20])


def as_messages(value: Any) -> list[dict[str, str]] | str:
    """Chat messages as [{role, content}], from a list or its JSON; a string is the reason why they are not."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "the messages are text and not a list of {role, content}"
    if not isinstance(value, list) or not value:
        return "the messages are not a list" if value else "there are no messages"
    messages = []
    for item in value:
        if not isinstance(item, dict):
            return "a message is not of the form {role, content}"
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if isinstance(content, list):  # parts, as multimodal data sets have them
            content = "".join(p.get("text") or "" for p in content if isinstance(p, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            return "a message lacks its role or its content"
        messages.append({"role": _ROLES.get(role.lower(), role.lower()), "content": content})
    return messages


def sample_of(row: dict[str, Any], columns: Columns) -> tuple[dict[str, Any] | None, str]:
    """(sample, "") or (None, the reason why the row is skipped)."""
    if columns.form == "chat":
        messages = as_messages(row.get(columns.name("messages")))
        if isinstance(messages, str):
            return None, messages
        if not any(m["content"].strip() for m in messages):
            return None, "every message is empty"
        return {"messages": messages}, ""
    if columns.form == "text":
        text = row.get(columns.name("text"))
        if not isinstance(text, str):
            return None, "it has no text"
        return ({"text": text}, "") if text.strip() else (None, "it is empty")
    prompt, completion = row.get(columns.name("prompt")), row.get(columns.name("completion"))
    if columns.context and isinstance(row.get(columns.context), str) and row[columns.context].strip():
        prompt = f"{prompt}\n\n{row[columns.context]}"
    sample: dict[str, Any] = {}
    for role, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, list):
            value = as_messages(value)
            if isinstance(value, str):
                return None, value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, (str, list)):
            return None, f"it has no {role}"
        if isinstance(value, str) and not value.strip():
            return None, f"its {role} is empty"
        sample[role] = value
    return sample, ""
