"""Variant and adapter notation ↔ objects. Only the grammar: the backends define methods and their options.

    METHOD[@SOURCE[@REVISION]][:option,option…]     nf4:dq,compute=fp16
    SOURCE[@REVISION][*SCALE][:merged]              pirate*0.5

SOURCE is the text between the first `@` and the last `:`, or an address http://…. In a path, a revision or a value the characters of
the grammar are percent-encoded. Lists are joined with `+`. The printed form is canonical: bare words first,
then `name=value`, each sorted by name; the backends omit defaults. Parsing the printed form returns an equal
object.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from urllib.parse import unquote

from comparator.core.errors import UserError

_MOST_CHARACTERS = 8_000  # a path may have 4,096, escaped
_WORD = re.compile(r"[a-z0-9_]+")
_UNSAFE = re.compile(r"[%@:,*=+\s]")
_ADDRESS = re.compile(
    r"https?://[^\s%@,*=+]+", re.IGNORECASE
)  # a source that needs no encoding; no options follow


def _quote(text: str, keep: str = "") -> str:
    """Percent-encode the characters of the grammar and white space, except those in `keep`."""
    return _UNSAFE.sub(lambda m: m[0] if m[0] in keep else "".join(f"%{b:02X}" for b in m[0].encode()), text)


def _bounded(text: str) -> str:
    """The notation. Raises `UserError` for one of a length that nobody writes, which would be quoted everywhere."""
    if len(text) > _MOST_CHARACTERS:
        raise UserError(
            f"“{text.strip()[:60]}…” has {len(text):,} characters.",
            f"The limit is {_MOST_CHARACTERS:,}.",
        )
    return text.strip()


def parse_variant(text: str) -> Variant:
    """`nf4:dq,compute=fp16` → Variant. Raises `UserError` on wrong grammar; options are not validated here."""
    notation = _bounded(text)
    if not notation:
        raise UserError("The variant is empty.", "Write a method such as bf16, int8, nf4 or gptq.")
    head, options = notation, ""
    at = notation.find("@")
    colon = notation.rfind(":") if at >= 0 else notation.find(":")
    if at >= 0 and _ADDRESS.fullmatch(notation, at + 1):
        colon = -1
    if colon > at or (at < 0 <= colon):
        head, options = notation[:colon], notation[colon + 1 :]
        if not options.strip():
            raise UserError(
                f"“{notation}” ends in a colon but names no option.", "Remove the colon, or add an option."
            )
    method, _, source = head.partition("@")
    method = method.strip().lower()
    if not _WORD.fullmatch(method):
        raise UserError(
            f"“{method or head}” is not a method name.", "A variant starts with a method: nf4, int8, bf16 …"
        )
    if "@" in head and not source:
        raise UserError(
            f"“{notation}” has an @ but no source after it.", "Write gptq@user/repo or gptq@/folder."
        )
    path, _, revision = source.partition("@")
    return Variant(
        method, unquote(path) or None, unquote(revision) or None, _parse_options(options, notation)
    )


def _parse_options(text: str, notation: str) -> tuple[tuple[str, str | None], ...]:
    options: dict[str, str | None] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        name = name.strip().lower()
        if not re.fullmatch(r"[a-z0-9_\-]+", name) or (equals and not value.strip()):
            raise UserError(
                f"“{part}” in “{notation}” is not an option.",
                "Options look like dq or compute=fp16, separated by commas. "
                "A : , or @ inside a path is written %3A %2C %40.",
            )
        if name in options:
            raise UserError(f"“{name}” appears twice in “{notation}”.", "Keep one of them.")
        options[name] = "+".join(unquote(v.strip()) for v in value.split("+")) if equals else None
    return sort_options(options)


def sort_options(options: dict[str, str | None]) -> tuple[tuple[str, str | None], ...]:
    """Canonical order: bare words, then `name=value`, each by name."""
    return tuple(sorted(options.items(), key=lambda o: (o[1] is not None, o[0])))


def format_variant(variant: Variant) -> str:
    """The canonical notation of a variant."""
    text = variant.method
    if variant.source:
        plain = _ADDRESS.fullmatch(variant.source) and not variant.revision and not variant.options
        text += "@" + (variant.source if plain else _quote(variant.source))
        if variant.revision:
            text += "@" + _quote(variant.revision)
    if variant.options:
        text += ":" + ",".join(
            name if value is None else f"{name}={_quote(value, keep='+')}"
            for name, value in sort_options(dict(variant.options))
        )
    return text


def parse_adapter(text: str) -> Adapter:
    """`user/repo@rev*0.5:merged` → Adapter. Raises `UserError` on wrong grammar."""
    notation = _bounded(text)
    body, _, flag = notation.partition(":")
    if flag and flag.strip().lower() != "merged":
        raise UserError(
            f"“{flag}” is not an adapter option.", "The one option is :merged. A : in a path is written %3A."
        )
    body, star, scale_text = body.partition("*")
    scale = 1.0
    if star:
        try:
            scale = float(scale_text)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UserError(f"“{scale_text}” is not a scale.", "Write a number: pirate*0.5")
    source, _, revision = body.partition("@")
    if not source.strip():
        raise UserError("The adapter is empty.", "Name a folder, a Hub repo, or the built-in pirate.")
    return Adapter(unquote(source.strip()), unquote(revision.strip()) or None, scale, bool(flag))


def format_adapter(adapter: Adapter) -> str:
    """The canonical notation of an adapter."""
    text = _quote(adapter.source)
    if adapter.revision:
        text += "@" + _quote(adapter.revision)
    if adapter.scale != 1.0:
        text += (
            f"*{adapter.scale:g}" if float(f"{adapter.scale:g}") == adapter.scale else f"*{adapter.scale!r}"
        )
    return text + (":merged" if adapter.merged else "")


@dataclass(frozen=True)
class Variant:
    """A method with its options: `nf4:dq,compute=fp16`. `comparator.backends.resolve` makes a validated one."""

    method: str
    source: str | None = None
    revision: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()  # (name, value); a bare word has value None

    @property
    def notation(self) -> str:
        from comparator.core.variant import format_variant

        return format_variant(self)

    def __str__(self) -> str:
        return self.notation


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: `pirate`, `user/repo@rev*0.5` (scaled), `pirate:merged`."""

    source: str
    revision: str | None = None
    scale: float = 1.0
    merged: bool = False

    @property
    def notation(self) -> str:
        from comparator.core.variant import format_adapter

        return format_adapter(self)

    def __str__(self) -> str:
        return self.notation


@dataclass(frozen=True)
class Cell:
    """One column: a variant, with or without an adapter."""

    variant: Variant
    adapter: Adapter | None = None

    @property
    def label(self) -> str:
        return self.variant.notation + (f" + {self.adapter.notation}" if self.adapter else "")


@dataclass(frozen=True)
class CellName:
    variant: str
    adapter: str | None = None
