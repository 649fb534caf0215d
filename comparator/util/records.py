"""Dataclasses from JSON that was read from a file: every field has its type, unknown keys are passed over."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


def record(kind: type[T], value: Any) -> T:
    """`value`, as `json.loads` gives it, as the dataclass `kind`, nested ones included. Raises `ValueError`."""
    return _adapter(kind).validate_python(value)


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
