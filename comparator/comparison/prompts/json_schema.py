"""A part of JSON Schema, enough for checks; what is not in it is refused when a set is read, never passed over."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 10
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_KEYWORDS: dict[str, tuple[type, ...]] = {
    "type": (str, list), "properties": (dict,), "required": (list,), "additionalProperties": (bool,), "items": (dict,),
    "enum": (list,), "minItems": (int,), "maxItems": (int,), "minLength": (int,), "maxLength": (int,),
    "minimum": (int, float), "maximum": (int, float), "const": (object,), "title": (str,), "description": (str,),
}  # fmt: skip


def refusal(schema: Any, depth: int = 0) -> str | None:
    """Why a schema is not taken, as a clause; None where it is."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return (
            "a schema is an object"
            if depth <= MAX_DEPTH
            else f"the schema nests more than {MAX_DEPTH} levels"
        )
    for name, value in schema.items():
        if name not in _KEYWORDS:
            return f"the schema's keyword “{name[:30]}” is not supported"
        if not isinstance(value, _KEYWORDS[name]):
            return f"the schema's “{name}” has the wrong type"
    unknown = [t for t in _types(schema) if t not in _TYPES]
    if unknown:
        return f"the schema's type “{str(unknown[0])[:30]}” is not known"
    parts = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return next(filter(None, (refusal(part, depth + 1) for part in parts)), None)


def mismatch(value: Any, schema: dict, place: str = "the answer") -> str | None:
    """Where a value does not fit a schema, in a few words; None where it fits."""
    types = _types(schema)
    if types and not any(_is(value, t) for t in types):
        return f"{place} is not of type {' or '.join(types)}"
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        return f"{place} is not one of the allowed values"
    if isinstance(value, bool):
        return None
    if isinstance(value, dict):
        return _object_mismatch(value, schema, place)
    if isinstance(value, list):
        if why := _size_mismatch(len(value), schema, "Items", f"{place}'s length"):
            return why
        each = schema.get("items", {})
        return next(filter(None, (mismatch(v, each, f"{place}[{n}]") for n, v in enumerate(value))), None)
    if isinstance(value, str):
        return _size_mismatch(len(value), schema, "Length", f"{place}'s length")
    return _size_mismatch(value, schema, "imum", place) if isinstance(value, (int, float)) else None


def _object_mismatch(value: dict, schema: dict, place: str) -> str | None:
    known = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            return f"{place} lacks “{str(name)[:40]}”"
    if schema.get("additionalProperties") is False and (extra := set(value) - set(known)):
        return f"{place} has “{min(extra)[:40]}”, which is not in the schema"
    found = (mismatch(value[n], part, f"“{n[:40]}”") for n, part in known.items() if n in value)
    return next(filter(None, found), None)


def _size_mismatch(size: float, schema: dict, ending: str, what: str) -> str | None:
    low, high = schema.get(f"min{ending}"), schema.get(f"max{ending}")
    if low is not None and size < low:
        return f"{what} is below {low}"
    return f"{what} is above {high}" if high is not None and size > high else None


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name]) or (
        name == "integer" and isinstance(value, float) and value.is_integer()
    )


def _types(schema: dict) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind
