"""Comparison ↔ link: pure functions.

    /?c=ID                                          opens a saved comparison
    /?model=M&v=nf4:dq&v=bf16&a=none&a=pirate&p=…   fills in the form; nothing runs

Only query strings: they are what reaches a page that is embedded in another. Everything that comes in is a
stranger's: lengths are bounded, values are parsed, a wrong one raises `UserError` that names it, and keys that
nobody here knows are left alone (a page has others of its own).

The keys of a recipe, all optional: `model`; `v` a variant (repeatable), or a whole column such as
`nf4 + pirate`; `a` an adapter or `none` (repeatable; every variant gets every adapter); `p` prompt; `s` system
prompt; `chat` 0 or 1; `tn` name of the chat template; `tv` a template variable, NAME=VALUE (repeatable);
`n` new tokens; `t` temperature; `top_p`; `top_k`; `rp` repetition penalty; `seed`;
`r` repeats, 0 for automatic; `decode`; `ref` the reference column; `f` fidelity.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.prompt_set import PromptSet
from comparator.core.request import (
    ChatTemplate,
    GenerationSettings,
    Request,
    TaskRequest,
    parse_variables,
    written_variables,
)
from comparator.core.result import CellResult, Comparison
from comparator.core.variant import Adapter, Cell, CellName, parse_adapter

MAX_LINK = 8_000  # characters that a link of ours has at most: what proxies and chat programs let through
MAX_QUERY = 128_000  # characters of a query that is still read
MAX_PROMPT = 32_000
MAX_NAME = 1_024  # a model, a variant, an adapter
MAX_COLUMNS = 32

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{20}[AQgw]")  # 16 bytes in base64; the last character has 2 bits
_NO_ADAPTER = "none"
_AND = " + "  # between the variant and the adapter of one column; neither notation can contain it
_WAY_OUT = "Correct the link, or open the page without it."


class BadId(UserError):
    """What should be an id has not the form of one."""


# ---------------------------------------------------------------- ids


def new_id() -> str:
    """An id nobody can guess: 16 random bytes, 22 characters that need no escaping in a link or file name.

    The first is a letter or a digit, so that an id is never taken for an option on a command line.
    """
    while True:
        text = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
        if _ID.fullmatch(text):
            return text


def check_id(text: object) -> str:
    """The id if it has the form of one: no path, no wildcard, nothing to escape. Raises `BadId`."""
    if isinstance(text, str) and _ID.fullmatch(text):
        return text
    raise BadId(
        f"“{_cut(text)}” is not the id of a comparison.",
        "An id has 22 letters, digits, - and _. Copy the whole link again, or run a new comparison here.",
    )


# ---------------------------------------------------------------- what a link can say


@dataclass(frozen=True)
class OpenComparison:
    """The link opens a saved comparison. The id has the right form; whether it exists, the store knows."""

    id: str


@dataclass(frozen=True)
class Recipe:
    """The link fills in the form. What is None, empty or default is left as the form has it."""

    model: str | None = None
    cells: tuple[Cell, ...] = ()
    prompt: str = ""
    system: str | None = None
    chat: bool | None = None
    template: ChatTemplate = field(default_factory=ChatTemplate)
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    reference: Cell | None = None
    fidelity: str | None = None
    prompts: PromptSet | None = None  # not in a link: it would be too long
    task: TaskRequest | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """The notations of the variants, each once, in order: what is ticked in the form."""
        return tuple(dict.fromkeys(c.variant.notation for c in self.cells))

    @property
    def adapters(self) -> tuple[str | None, ...]:
        """The notations of the adapters, each once, in order; None stands for no adapter."""
        return tuple(dict.fromkeys(c.adapter.notation if c.adapter else None for c in self.cells))


def recipe_of(source: Request | Comparison) -> Recipe:
    """What would have to be asked for to get this again. Raises `UserError` if a column's notation is unknown."""
    if isinstance(source, Request):
        return Recipe(
            source.model, source.cells, source.prompt, source.system, source.chat, source.template, source.settings,
            source.reference, source.fidelity, source.prompts, source.task,
        )  # fmt: skip
    known = source.prompt_set
    return Recipe(
        source.model,
        tuple(_measured(c) for c in source.cells),
        source.prompt.text,
        source.prompt.system,
        source.prompt.chat,
        ChatTemplate(source.prompt.template, source.prompt.template_vars),
        source.settings,
        _measured(source.reference) if source.reference else None,
        prompts=PromptSet(known.name, known.prompts) if known and not known.task else None,
        task=TaskRequest(known.task.names, known.task.limit) if known and known.task else None,
    )


def _measured(named: CellResult | CellName) -> Cell:
    return Cell(resolve(named.variant), parse_adapter(named.adapter) if named.adapter else None)


# ---------------------------------------------------------------- out


def comparison_url(base: str, id: str) -> str:
    """The link to a saved comparison. `base` is the page's address; its own query is left out."""
    return _join(base, [("c", check_id(id))])


def recipe_url(base: str, source: Recipe | Request | Comparison) -> str:
    """The link that fills in the form. Raises `UserError` where it would be longer than links may be."""
    recipe = source if isinstance(source, Recipe) else recipe_of(source)
    url = _join(base, _pairs(recipe))
    if len(url) > MAX_LINK:
        raise UserError(
            f"The prompt is too long for a link: it would have {len(url):,} characters; the limit is {MAX_LINK:,}.",
            "Run it and share the comparison itself, or shorten the prompt.",
        )
    return url


def _pairs(recipe: Recipe) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = [("model", recipe.model)] if recipe.model is not None else []
    variants = list(dict.fromkeys(c.variant for c in recipe.cells))
    adapters = list(dict.fromkeys(c.adapter for c in recipe.cells))
    if adapters in ([], [None]) and len(variants) == len(recipe.cells):
        pairs += [("v", v.notation) for v in variants]
    elif recipe.cells == tuple(Cell(v, a) for v in variants for a in adapters):
        pairs += [("v", v.notation) for v in variants] + [("a", _adapter_text(a)) for a in adapters]
    else:
        pairs += [("v", _column_text(c)) for c in recipe.cells]
    if recipe.prompt:
        pairs.append(("p", recipe.prompt))
    if recipe.system is not None:
        pairs.append(("s", recipe.system))
    if recipe.chat is not None:
        pairs.append(("chat", "1" if recipe.chat else "0"))
    if recipe.template.name is not None:
        pairs.append(("tn", recipe.template.name))
    pairs += [("tv", text) for text in written_variables(recipe.template.variables)]
    default = GenerationSettings()
    for key, name in _SETTINGS.items():
        value = getattr(recipe.settings, name)
        if value != getattr(default, name):
            pairs.append((key, str(value)))
    if recipe.reference is not None:
        pairs.append(("ref", _column_text(recipe.reference)))
    if recipe.fidelity is not None:
        pairs.append(("f", recipe.fidelity))
    return pairs


def _adapter_text(adapter: Adapter | None) -> str:
    if adapter is None:
        return _NO_ADAPTER
    # An adapter that is really called “none” is written so that it parses to the same name.
    return "%6Eone" if adapter.notation == _NO_ADAPTER else adapter.notation


def _column_text(cell: Cell) -> str:
    return cell.variant.notation + _AND + _adapter_text(cell.adapter)


def _join(base: str, pairs: Iterable[tuple[str, str]]) -> str:
    try:
        parts = urlsplit(base)
    except ValueError:
        parts = None
    if parts is None or parts.scheme not in ("", "http", "https"):
        raise UserError(
            f"“{_cut(base)}” is not the address of a page.", "It starts with http:// or https://."
        )
    try:
        # A slash, a colon or a comma is fine in a query; so notations stay readable.
        query = urlencode(list(pairs), safe="/:,@")
    except UnicodeEncodeError:
        raise UserError(
            "The text has characters that are not Unicode text.", "Remove them and try again."
        ) from None
    return urlunsplit((parts.scheme, parts.netloc, parts.path or "/", query, ""))


# ---------------------------------------------------------------- in


def parse_query_string(query: str) -> OpenComparison | Recipe | None:
    """The same for the text after the `?`, which may also start with it. Raises `UserError`."""
    if len(query) > MAX_QUERY:
        raise UserError(f"This link is too long: {len(query):,} characters.", _WAY_OUT)
    try:
        return parse_query(parse_qs(query.removeprefix("?"), keep_blank_values=True, max_num_fields=200))
    except ValueError:
        raise UserError("This link has too many parameters.", _WAY_OUT) from None


def parse_query(params: Mapping[str, list[str] | str]) -> OpenComparison | Recipe | None:
    """What a link asks for, or None where it asks for nothing of ours.

    `params` maps a key to its value or values (`parse_qs`; for Starlette, `parse_query_string(str(...))` keeps
    the repeated ones). `c` outranks a recipe. Raises `UserError` naming the key and the value that is wrong.
    """
    known = {k: [v] if isinstance(v, str) else list(v) for k, v in params.items() if k in _KEYS}
    known = {k: v for k, v in known.items() if v}
    if not known:
        return None
    for key, values in known.items():
        if not all(isinstance(v, str) for v in values):
            raise UserError(f"In this link, {key} is not text.", _WAY_OUT)
        if len(values) > (MAX_COLUMNS if key in ("v", "a", "tv") else 1):
            raise UserError(f"In this link, {key} appears {len(values)} times.", _WAY_OUT)
        longest = max(len(v) for v in values)
        allowed = MAX_PROMPT if key in ("p", "s", "tv") else MAX_NAME
        if longest > allowed:
            raise UserError(
                f"In this link, {key} has {longest:,} characters; {allowed:,} are allowed.", _WAY_OUT
            )
    if "c" in known:
        return OpenComparison(check_id(known["c"][0].strip()))
    one = {key: values[0] for key, values in known.items()}
    return Recipe(
        model=one.get("model") or None,
        cells=_columns(known.get("v", []), known.get("a", [])),
        prompt=one.get("p", ""),
        system=one.get("s"),
        chat=_choice("chat", one["chat"], {"1": True, "true": True, "0": False, "false": False})
        if "chat" in one
        else None,
        template=ChatTemplate(one.get("tn") or None, _variables(known.get("tv", []))),
        settings=GenerationSettings(
            **{name: _setting(key, one[key]) for key, name in _SETTINGS.items() if key in one}
        ),
        reference=_named("ref", one["ref"], _column) if one.get("ref") else None,
        fidelity=_choice("f", one["f"], {w: w for w in ("none", "prompt", "text")}) if "f" in one else None,
    )


# The keys of the settings, what each sets, and what it takes.
_SETTINGS = {
    "n": "max_new_tokens",
    "t": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "rp": "repetition_penalty",
    "seed": "seed",
    "r": "repeats",
    "decode": "decode",
}
_RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 1_000_000),
    "t": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 10_000_000),
    "rp": (0, 100),
    "seed": (-(2**63), 2**64 - 1),
    "r": (0, 1_000),
}
_KEYS = {"c", "model", "v", "a", "p", "s", "chat", "tn", "tv", "ref", "f", *_SETTINGS}
assert set(_SETTINGS.values()) == {f.name for f in fields(GenerationSettings)}, (
    "a setting has no key in links"
)


def _setting(key: str, text: str) -> Any:
    name = _SETTINGS[key]
    if key == "decode":
        if re.fullmatch(r"[a-z][a-z-]{0,31}", text):
            return text
        raise _wrong(key, text, "is not a word such as auto or eager")
    whole = isinstance(getattr(GenerationSettings(), name), int)
    if not re.fullmatch(
        r"-?[0-9]{1,20}" if whole else r"-?[0-9]{0,20}\.?[0-9]{0,40}(e-?[0-9]{1,3})?", text.lower()
    ):
        raise _wrong(key, text, "is not a whole number" if whole else "is not a number")
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise _wrong(key, text, "is not a number") from None
    low, high = _RANGES[key]
    if not low <= value <= high:
        raise _wrong(key, text, f"is outside {low:g} to {high:g}")
    return value


def _variables(pairs: list[str]) -> dict[str, Any]:
    return {
        name: value
        for pair in pairs
        for name, value in _named("tv", pair, lambda p: parse_variables([p])).items()
    }


def _columns(variants: list[str], adapters: list[str]) -> tuple[Cell, ...]:
    attached = [_named("a", a, _adapter) for a in adapters] or [None]
    cells = []
    for text in variants:
        cell = _named("v", text, _column)
        cells += [cell] if _AND in text else [Cell(cell.variant, a) for a in attached]
    if len(cells) > MAX_COLUMNS:
        raise UserError(
            f"In this link, v and a make {len(cells)} columns; the limit is {MAX_COLUMNS}.", _WAY_OUT
        )
    return tuple(dict.fromkeys(cells))


def _column(text: str) -> Cell:
    variant, joined, adapter = text.partition(_AND)
    return Cell(resolve(variant), _adapter(adapter) if joined else None)


def _adapter(text: str) -> Adapter | None:
    return None if text.strip() == _NO_ADAPTER else parse_adapter(text)


def _named(key: str, text: str, parse):
    try:
        return parse(text)
    except UserError as problem:
        raise UserError(
            f"In this link, {key} is “{_cut(text)}”: {problem.problem}", problem.advice or _WAY_OUT
        ) from None


def _choice(key: str, text: str, choices: dict[str, Any]) -> Any:
    if text.lower() in choices:
        return choices[text.lower()]
    raise _wrong(key, text, f"is not one of {', '.join(choices)}")


def _wrong(key: str, text: str, what: str) -> UserError:
    meaning = _SETTINGS.get(key, key).replace("_", " ")
    named = key if meaning == key else f"{key} ({meaning})"
    return UserError(f"In this link, {named} is “{_cut(text)}”, which {what}.", _WAY_OUT)


def _cut(text: object, length: int = 80) -> str:
    shown = str(text).replace("\n", " ")
    return shown if len(shown) <= length else shown[:length] + "…"
