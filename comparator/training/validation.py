"""Validates settings, names and folders of a training run. Raises `UserError` naming what is wrong."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.training.settings import SETTINGS, TrainSettings
from comparator.training.types import TrainRequest

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


def settings(values: TrainSettings) -> None:
    """Check every field's type and range."""
    for setting in SETTINGS:
        value = getattr(values, setting.name)
        if setting.kind == "choice":
            if value not in setting.choices:
                raise UserError(f"{setting.title} is “{value}”.", f"Use one of {', '.join(setting.choices)}.")
        elif setting.kind == "names":
            if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
                raise UserError(f"{setting.title} is {value!r}.", "Give a list of names.")
        elif setting.kind in ("int", "float"):
            right = isinstance(value, (int, float) if setting.kind == "float" else int) and not isinstance(
                value, bool
            )
            low, high = setting.minimum or 0, setting.maximum if setting.maximum is not None else math.inf
            if not right or not low <= value <= high:
                raise UserError(
                    f"{setting.title} is {value}.", f"It must be between {low:g} and {high:,.12g}."
                )
        elif not isinstance(value, bool) and not (value is None and setting.kind == "bool-or-auto"):
            raise UserError(f"{setting.title} is {value!r}.", "Use on or off.")
    if values.learning_rate == 0:
        raise UserError("The learning rate is 0, so nothing is trained.", "2e-4 is a good start.")
    if values.dropout and values.dora and values.dropout > 0.5:
        raise UserError("A dropout above 0.5 with DoRA leaves little to learn from.", "Lower the dropout.")


def from_words(values: dict[str, Any]) -> TrainSettings:
    """Settings from the plain values of the command line and the page. Raises `UserError` for unknown names."""
    import difflib

    known = {f.name for f in fields(TrainSettings)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"There is no setting “{name}”.",
                f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}.",
            )
    result = TrainSettings(**values)
    settings(result)
    return result


def name(text: str, taken: set[str]) -> None:
    """Check an adapter's name, which names a folder and is used in the adapter notation."""
    if not _NAME.fullmatch(text) or ":" in text:
        raise UserError(
            f"“{text[:80]}” cannot be the name of an adapter.",
            "Up to 64 letters, digits, dots, dashes and underscores, beginning with a letter or a digit.",
        )
    if text.lower() in {t.lower() for t in taken}:
        raise UserError(f"{text} already exists.", "Choose another name: nothing is overwritten.")


def free_name(request: TrainRequest, taken: set[str]) -> str:
    """A name such as `pirate-nf4-dq`, with a number appended if it is taken."""
    stem = Path(request.data.title).name
    stem = stem.rsplit(".", 1)[0] if "." in stem else stem
    words = f"{stem}-{request.base.partition('@')[0]}"
    plain = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower()[:48].strip("-") or "adapter"
    used = {t.lower() for t in taken}
    if plain not in used:
        return plain
    return next(n for i in range(2, 10_000) if (n := f"{plain}-{i}") not in used)


def output(target: Path) -> None:
    """Check the adapter's folder: new or empty, and writable."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists.", "Name a new folder: nothing is overwritten.")
    above = next(p for p in target.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(
            f"{above} cannot be written to: {error.strerror}.", "Choose another folder."
        ) from None
