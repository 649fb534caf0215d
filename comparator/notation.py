"""Variant and adapter notation ↔ objects. Grammar alone: what a method takes, the backends say.

    METHOD[@SOURCE[@REVISION]][:option,option…]     nf4:dq,compute=fp16
    SOURCE[@REVISION][*SCALE][:merged]              pirate*0.5

SOURCE runs from the first `@` to the last `:`. Inside a path, a revision or a value the characters that
the grammar uses are percent-encoded. Lists join with `+`. The printed form is canonical: bare words first,
then `name=value`, each sorted by name; the backends leave defaults out. Parsing what was printed gives the
same object back.
"""

from __future__ import annotations

import math
import re
from urllib.parse import unquote

from comparator.types import Adapter, Problem, Variant

_WORD = re.compile(r"[a-z0-9_]+")
_UNSAFE = re.compile(r"[%@:,*=+\s]")


def _quote(text: str, keep: str = "") -> str:
    """Percent-encode what the grammar uses, and white space; everything else stays readable."""
    return _UNSAFE.sub(lambda m: m[0] if m[0] in keep else "".join(f"%{b:02X}" for b in m[0].encode()), text)


def parse_variant(text: str) -> Variant:
    """`nf4:dq,compute=fp16` → Variant. Raises `Problem` on wrong grammar; options are not judged here."""
    given = text.strip()
    if not given:
        raise Problem("The variant is empty.", "Write a method such as bf16, int8, nf4 or gptq.")
    head, options = given, ""
    at = given.find("@")
    colon = given.rfind(":") if at >= 0 else given.find(":")
    if colon > at or (at < 0 <= colon):
        head, options = given[:colon], given[colon + 1 :]
        if not options.strip():
            raise Problem(
                f"“{given}” ends in a colon but names no option.", "Leave the colon out, or add an option."
            )
    method, _, source = head.partition("@")
    method = method.strip().lower()
    if not _WORD.fullmatch(method):
        raise Problem(
            f"“{method or head}” is not a method name.", "A variant starts with a method: nf4, int8, bf16 …"
        )
    if "@" in head and not source:
        raise Problem(f"“{given}” has an @ but no source after it.", "Write gptq@user/repo or gptq@/folder.")
    path, _, revision = source.partition("@")
    return Variant(method, unquote(path) or None, unquote(revision) or None, _parse_options(options, given))


def _parse_options(text: str, given: str) -> tuple[tuple[str, str | None], ...]:
    found: dict[str, str | None] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        name = name.strip().lower()
        if not re.fullmatch(r"[a-z0-9_\-]+", name) or (equals and not value.strip()):
            raise Problem(
                f"“{part}” in “{given}” is not an option.",
                "Options look like dq or compute=fp16, with commas between. "
                "A : , or @ inside a path is written %3A %2C %40.",
            )
        if name in found:
            raise Problem(f"“{name}” stands twice in “{given}”.", "Keep one of them.")
        found[name] = "+".join(unquote(v.strip()) for v in value.split("+")) if equals else None
    return sort_options(found)


def sort_options(options: dict[str, str | None]) -> tuple[tuple[str, str | None], ...]:
    """Canonical order: bare words, then `name=value`, each by name."""
    return tuple(sorted(options.items(), key=lambda o: (o[1] is not None, o[0])))


def format_variant(variant: Variant) -> str:
    """The canonical notation of a variant."""
    text = variant.method
    if variant.source:
        text += "@" + _quote(variant.source)
        if variant.revision:
            text += "@" + _quote(variant.revision)
    if variant.options:
        text += ":" + ",".join(
            name if value is None else f"{name}={_quote(value, keep='+')}"
            for name, value in sort_options(dict(variant.options))
        )
    return text


def parse_adapter(text: str) -> Adapter:
    """`user/repo@rev*0.5:merged` → Adapter. Raises `Problem` on wrong grammar."""
    given = text.strip()
    body, _, flag = given.partition(":")
    if flag and flag.strip().lower() != "merged":
        raise Problem(
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
            raise Problem(f"“{scale_text}” is not a strength.", "Write a number: pirate*0.5")
    source, _, revision = body.partition("@")
    if not source.strip():
        raise Problem("The adapter is empty.", "Name a folder, a Hub repo, or the built-in pirate.")
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
