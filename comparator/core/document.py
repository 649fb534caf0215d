"""The comparison document: `Comparison` ↔ JSON, schema 1, and 2 with a prompt set.

A document may come from anyone, so `loads` is strict: size and depth are limited before anything is parsed, every field
must have its type, numbers must be finite. Unknown keys are ignored, because additions do not change the schema. Strings
are not interpreted.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.core.errors import UserError
from comparator.core.result import SCHEMA, Comparison
from comparator.core.settings import get_settings
from comparator.core.votes import fits

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import SchemaValidator

MAX_DEPTH = 24  # a comparison needs 9
MAX_VALUES = 2_000_000  # eight columns of a 70B model with a thousand new tokens have some 0.6 million
_MAX_INT = 2**63 - 1

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # possessive: linear time on any input
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")


def dumps(comparison: Comparison, *, indent: int | None = None) -> str:
    """The document as JSON text. Raises `UserError` if a number is NaN or infinite."""
    _check_numbers(comparison)
    text = json.dumps(
        comparison.to_dict(),
        ensure_ascii=False,
        allow_nan=False,
        indent=indent,
        separators=None if indent else (",", ":"),
    )
    # A lone surrogate (bytes of a command line that were not UTF-8) cannot be written to any file.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def loads(data: str | bytes, *, max_bytes: int | None = None) -> Comparison:
    """JSON text → `Comparison`, equal to the one that was written. Raises `UserError` on anything but a valid document.

    `max_bytes` defaults to the setting COMPARATOR_MAX_UPLOAD.
    """
    limit = get_settings().max_upload_bytes if max_bytes is None else max_bytes
    if len(data) > limit:  # before any copy is made; characters are at most bytes
        raise _too_large(len(data), limit)
    raw = (
        data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data.removeprefix(b"\xef\xbb\xbf")
    )
    if len(raw) > limit:
        raise _too_large(len(raw), limit)
    _check_shape(raw)
    _check_schema(raw)

    from pydantic import ValidationError

    try:
        comparison = _validator(Comparison).validate_json(raw, strict=True)
    except ValidationError as error:
        raise _invalid(error) from None
    if not _ID.fullmatch(comparison.id):
        raise UserError(
            "This document's id is not one that a comparison can have.",
            "Ids are letters, digits, - and _; the file was changed or made by another program.",
        )
    try:
        datetime.fromisoformat(comparison.created_at)
    except ValueError:
        raise UserError(
            f"This document's date, “{comparison.created_at[:40]}”, is not a date.",
            "created_at is written as 2026-01-31T12:00:00+00:00.",
        ) from None
    _check_numbers(comparison)
    _check_set(comparison)
    _check_votes(comparison)
    return comparison


def _check_set(comparison: Comparison) -> None:
    """Raises `UserError` where a prompt set's answers are not one per column and prompt."""
    result = comparison.prompt_set
    if result is None:
        return
    lengths = {len(column) for column in result.answers} or {0}
    if len(result.answers) != len(comparison.cells) or lengths != {len(result.prompts)}:
        raise UserError(
            "This document's prompt set is damaged: its answers are not one per variant and prompt.",
            "Take the original file.",
        )


def _check_votes(comparison: Comparison) -> None:
    """Raises `UserError` where votes are not on this document's columns and prompts."""
    votes, columns = comparison.votes, len(comparison.cells)
    if votes is not None and not fits(votes, columns, comparison.prompt_count):
        raise UserError(
            "This document's votes are damaged: they do not match its variants and prompts, or are too many.",
            "Take the original file.",
        )


def read(path: Path | str, *, max_bytes: int | None = None) -> Comparison:
    """A document from a file. Raises `UserError` if it is missing, too large or not a document."""
    path = Path(path)
    limit = get_settings().max_upload_bytes if max_bytes is None else max_bytes
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)  # a larger file is not read into memory
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.", "Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder.", "Name the JSON document in it.") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}.", "Check its permissions."
        ) from None
    if len(data) > limit:
        raise _too_large(path.stat().st_size, limit)
    return loads(data, max_bytes=limit)


# ---------------------------------------------------------------- before parsing


def _too_large(size: int, limit: int) -> UserError:
    return UserError(
        f"This file has {size / 1e6:,.1f} MB; a comparison document may have {limit / 1e6:,.1f} MB.",
        "Raise COMPARATOR_MAX_UPLOAD if you trust it.",
    )


def _check_shape(raw: bytes) -> None:
    """Raise `UserError` for too many values or levels, counted on the bytes, so that a hostile file is never parsed."""
    too_many = UserError(
        f"This document contains more than {MAX_VALUES:,} values.",
        "No comparison has that many; it was not made here.",
    )
    if raw.count(b'"') > 4 * MAX_VALUES:  # a key and a string each; cutting out millions of them takes memory
        raise too_many
    outline = _STRING.sub(b"", raw)
    values = outline.count(b",") + outline.count(b"[") + outline.count(b"{")
    if values > MAX_VALUES:
        raise too_many
    outline = outline.translate(_SQUARE, _NOT_STRUCTURE)
    for _ in range(MAX_DEPTH):
        if not outline:
            return
        outline = outline.replace(b"[]", b"")  # removes the innermost level
    if outline.count(b"[") > MAX_DEPTH or b"[]" in outline:
        raise UserError(
            f"This document nests more than {MAX_DEPTH} levels deep.",
            "No comparison does; it was not made here.",
        )


@dataclass(frozen=True)
class _Head:
    schema: int


def _check_schema(raw: bytes) -> None:
    from pydantic import ValidationError

    try:
        schema = _validator(_Head).validate_json(raw, strict=True).schema
    except ValidationError as error:
        raise _invalid(error) from None
    if schema > SCHEMA:
        raise UserError(
            f"Schema {schema} is newer than this installation reads, which is {SCHEMA}.",
            "Update Quant Comparator to open this document.",
        )
    if schema < 1:
        raise UserError(f"There is no schema {schema}.", "The file was changed or made by another program.")


# ---------------------------------------------------------------- while parsing and after


@cache
def _validator(kind: type) -> SchemaValidator:
    """pydantic's validator of a dataclass that stops at the first bad entry of a list or a mapping.

    By default a document of four million wrong entries makes four million errors, which take two gigabytes.
    """
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

    def stop_early(schema: Any) -> Any:
        if isinstance(schema, dict):
            changed = {key: stop_early(value) for key, value in schema.items()}
            return (
                changed | {"fail_fast": True} if schema.get("type") in ("tuple", "list", "dict") else changed
            )
        return [stop_early(value) for value in schema] if isinstance(schema, list) else schema

    return SchemaValidator(stop_early(TypeAdapter(kind).core_schema))


def _invalid(error: ValidationError) -> UserError:
    """The first error with its place, in one sentence that quotes at most 40 characters."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return UserError(
            f"This is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}.",
            "Choose the .json file that Quant Comparator wrote.",
        )
    place = ".".join(str(part) for part in first["loc"]) or "the document"
    if first["type"] == "missing" or first["loc"] == ():
        return UserError(
            f"This is not a comparison document: {place[:80]} is missing or not an object.",
            "Choose the .json file that Quant Comparator wrote.",
        )
    message = first["msg"][:1].lower() + first["msg"][1:]
    return UserError(
        f"This comparison document is damaged: {place[:120]}: {message[:160]}, found {_shortly(first['input'])}.",
        "Take the original file; every field has one fixed type.",
    )


def _shortly(value: Any) -> str:
    if isinstance(value, str):
        return f"“{value[:40]}{'…' if len(value) > 40 else ''}”"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return str(value)[:40]


def _check_numbers(value: Any) -> None:
    """Raise `UserError` naming the place of a number that is NaN, infinite or longer than 63 bits."""
    stack: list[tuple[Any, tuple]] = [(value, ())]  # not recursive: the place is a linked list of its parents
    while stack:
        item, place = stack.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                raise _bad_number(place, str(item))
        elif isinstance(item, bool) or item is None or isinstance(item, str):
            continue
        elif isinstance(item, int):
            if abs(item) > _MAX_INT:
                raise _bad_number(place, "a number of more than 63 bits")
        elif isinstance(item, (tuple, list)):
            stack += ((child, (index, place)) for index, child in enumerate(item))
        elif isinstance(item, dict):
            stack += ((child, (key, place)) for key, child in item.items())
        elif is_dataclass(item):
            stack += ((getattr(item, f.name), (f.name, place)) for f in fields(item))


def _bad_number(place: tuple, problem: str) -> UserError:
    parts: list[str] = []
    while place:
        parts.append(str(place[0]))
        place = place[1]
    return UserError(
        f"{'.'.join(reversed(parts))[:120]} is {problem}.",
        "A figure is a finite number, or null where it was not measured.",
    )
