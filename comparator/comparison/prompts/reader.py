"""Text of a prompt set → `PromptSet`: JSONL, a JSON list, CSV with a heading, or a prompt per line.

A bad entry is refused by its number, with a way out; nothing is skipped silently. The size is limited before anything is
parsed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from comparator.comparison.prompts import checks
from comparator.core.errors import UserError
from comparator.core.prompt_set import Message, PromptSet, SetPrompt

MAX_BYTES = 8_000_000
MAX_PROMPTS = 2_000
MAX_CHARACTERS = 200_000  # of one prompt, its system prompt and turns included
MAX_ENTRIES = 50  # of `expected`, `choices` and turns
FIELDS = ("id", "prompt", "system", "messages", "expected", "choices", "check", "kind")
_SHIPPED = Path(__file__).resolve().parents[2] / "data" / "prompts"
_ID = re.compile(r"[^\s\x00-\x1f]{1,60}")


def shipped() -> dict[str, Path]:
    """The sets that come with the program, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.jsonl"))}


def load(name: str | Path) -> PromptSet:
    """A built-in set by its name, or a file. Raises `UserError`."""
    path = shipped().get(str(name)) or Path(os.path.expanduser(name))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"The prompt set {name} cannot be read: {error.strerror or error}.",
            f"Name a file (.jsonl, .csv or a prompt per line), or a built-in set: {', '.join(shipped())}.",
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if len(data) > MAX_BYTES:
            text = "x" * len(data)  # cut within a character; `parse` refuses its size
        else:
            raise UserError(f"{path.name} is not text in UTF-8.", "Save it as UTF-8 and try again.") from None
    return parse(text, path.stem, path.suffix)


def parse(text: str, name: str = "your prompts", ending: str = "") -> PromptSet:
    """The prompts in a text; its form follows from the ending, else from how it begins. Raises `UserError`."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise UserError(
            f"The prompt set has more than {MAX_BYTES / 1e6:.0f} MB.", "Split it into several sets."
        )
    entries = list(_entries(text.removeprefix("\ufeff"), ending.lower()))
    if not entries:
        raise UserError("The prompt set is empty.", "Write a prompt per line, or a JSON object per line.")
    if len(entries) > MAX_PROMPTS:
        raise UserError(
            f"The set has {len(entries):,} prompts; the limit is {MAX_PROMPTS:,}.",
            "Split it into several sets.",
        )
    prompts: dict[str, SetPrompt] = {}
    for place, entry in entries:
        try:
            prompt = _prompt(entry, str(len(prompts) + 1))
        except UserError as problem:
            raise UserError(f"{place}: {problem.problem}", problem.advice) from None
        if prompt.id in prompts:
            raise UserError(
                f"{place}: the id “{prompt.id}” appears twice.", "Give each prompt its own id, or none."
            )
        prompts[prompt.id] = prompt
    return PromptSet(name[:80] or "your prompts", tuple(prompts.values()))


def dumps(prompts: PromptSet) -> str:
    """The set as JSONL, which `parse` reads back."""
    return "".join(json.dumps(_written(p), ensure_ascii=False) + "\n" for p in prompts.prompts)


def _written(prompt: SetPrompt) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": prompt.id}
    if prompt.history:
        turns = [*prompt.history, Message("user", prompt.prompt)]
        entry["messages"] = [{"role": m.role, "content": m.content} for m in turns]
    else:
        entry["prompt"] = prompt.prompt
    values = {n: getattr(prompt, n) for n in ("system", "expected", "choices", "check", "kind")}
    return entry | {n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v}


# ---------------------------------------------------------------- the forms


def _entries(text: str, ending: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, its fields or its text) of each entry."""
    start = text.lstrip()[:1]
    if ending == ".csv" or (not ending and _looks_like_csv(text)):
        return _csv(text)
    if ending == ".json" or (start == "[" and ending != ".txt"):
        return _json_list(text)
    if ending in (".jsonl", ".ndjson") or (start == "{" and ending != ".txt"):
        return _jsonl(text)
    return ((f"Line {n}", line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip())


def _looks_like_csv(text: str) -> bool:
    names = [n.strip().strip('"').lower() for n in re.split(r"[,;\t]", text.lstrip().partition("\n")[0])]
    return len(names) > 1 and "prompt" in names and set(names) <= set(FIELDS)


def _jsonl(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"Line {number}", _loads(line, f"Line {number}")


def _json_list(text: str) -> Iterator[tuple[str, Any]]:
    values = _loads(text, "The file")
    if not isinstance(values, list):
        raise UserError("The file does not contain a list.", "Write [ {…}, {…} ], or one object per line.")
    yield from ((f"Entry {n}", value) for n, value in enumerate(values, 1))


def _loads(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it nests too deep"
        raise UserError(
            f"{place} is not JSON: {why}.", 'Write {"prompt": "…", "check": "contains", "expected": "…"}.'
        ) from None


def _csv(text: str) -> Iterator[tuple[str, Any]]:
    head = text.lstrip("\n").partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        names = [n.strip().lower() for n in next(rows, [])]
        if "prompt" not in names:
            raise UserError(
                "Line 1: the header has no column “prompt”.", f"Name the columns: {', '.join(FIELDS)}."
            )
        while (row := next(rows, None)) is not None:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise UserError(
                    f"Line {rows.line_num}: it has {len(row)} cells, the header {len(names)}.",
                    "Put double quotes around a cell that contains the separator.",
                )
            entry: dict[str, Any] = {n: cell for n, cell in zip(names, row, strict=True) if cell.strip()}
            for name in ("expected", "choices"):  # several are separated by |
                if "|" in entry.get(name, "") and entry.get("check") not in ("regex", "json"):
                    entry[name] = [part.strip() for part in entry[name].split("|")]
            yield f"Line {rows.line_num}", entry
    except csv.Error as error:
        raise UserError(f"Line {rows.line_num}: {error}.", "Check the double quotes there.") from None


# ---------------------------------------------------------------- one entry


def _prompt(entry: Any, number: str) -> SetPrompt:
    """Raises `UserError` whose problem is a clause: the caller puts the place before it."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise UserError("it is neither a text nor an object.", 'Write {"prompt": "…"}.')
    if unknown := [n for n in entry if n not in FIELDS]:
        raise UserError(
            f"there is no field “{str(unknown[0])[:40]}”.", f"The fields are {', '.join(FIELDS)}."
        )
    text, system, history = _turns(entry)
    check = _text(entry, "check")
    choices = _listed(entry, "choices")
    expected = _listed(entry, "expected")
    if check is None and expected:
        check = "choice" if choices else "contains"
    id = str(entry.get("id") or number).strip()
    if not _ID.fullmatch(id):
        raise UserError(
            f"“{id[:40]}” is not a valid id.", "An id has up to 60 characters and no white space."
        )
    prompt = SetPrompt(id, text, system, history, expected, choices, check, (_text(entry, "kind") or "")[:40])
    if prompt.characters > MAX_CHARACTERS:
        raise UserError(
            f"it has {prompt.characters:,} characters; the limit is {MAX_CHARACTERS:,}.", "Shorten it."
        )
    checks.validate(prompt)
    return prompt


def _turns(entry: dict) -> tuple[str, str | None, tuple[Message, ...]]:
    """(the last turn, the system prompt, the turns before)."""
    system = _text(entry, "system")
    if "messages" not in entry:
        text = _text(entry, "prompt")
        if not text:
            raise UserError("it has no prompt.", 'Write {"prompt": "…"}, or delete the line.')
        return text, system, ()
    messages = entry["messages"]
    if isinstance(messages, str):
        messages = _loads(messages, "messages")
    turns: list[Message] = []
    for message in messages if isinstance(messages, list) else [None]:
        role, content = (
            (message.get(n) for n in ("role", "content")) if isinstance(message, dict) else (None, None)
        )
        if not isinstance(content, str) or not content.strip() or role not in ("system", "user", "assistant"):
            raise UserError(
                "“messages” is a list of turns with a role (system, user, assistant) and a content.",
                'Write [{"role": "user", "content": "…"}].',
            )
        turns.append(Message(role, content))
    if turns and turns[0].role == "system":
        system, turns = system or turns[0].content, turns[1:]
    if len(turns) > MAX_ENTRIES:
        raise UserError(f"“messages” has {len(turns)} turns; the limit is {MAX_ENTRIES}.", "Leave some out.")
    # A user's turn may follow another: the column's own answer stands between them.
    roles = ["assistant", *(m.role for m in turns)]
    if any(b != "user" and a != "user" for a, b in pairwise(roles)):
        raise UserError(
            "in “messages”, an answer does not follow a user's turn.",
            "Start with the user's turn, optionally after a system prompt, and give one answer per turn.",
        )
    if not turns or turns[-1].role != "user" or "prompt" in entry:
        raise UserError(
            "“messages” must end with a user's turn, without “prompt” beside it.",
            "Remove the last answer, or “prompt”.",
        )
    return turns[-1].content, system, tuple(turns[:-1])


def _text(entry: dict, name: str) -> str | None:
    value = entry.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UserError(f"“{name}” is not text.", f'Write "{name}": "…".')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"“{name}” contains half a character (an unpaired surrogate).", "Type it again."
        ) from None
    return value if name == "prompt" and value.strip() else value.strip() or None


def _listed(entry: dict, name: str) -> tuple[str, ...]:
    """A text, a number, an object (a JSON schema) or a list of them, as texts."""
    value = entry.get(name)
    values = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if len(values) > MAX_ENTRIES:
        raise UserError(f"“{name}” has {len(values)} entries; the limit is {MAX_ENTRIES}.", "Leave some out.")
    texts = []
    for one in values:
        if isinstance(one, bool) or one is None or isinstance(one, list):
            raise UserError(
                f"“{name}” contains something that is neither text nor a number.", f'Write "{name}": "…".'
            )
        texts.append(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False))
    return tuple(text for text in texts if text.strip())
