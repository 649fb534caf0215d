"""Settings, names and folders of a training: ranges and rules. Raises `Problem` naming what is out of them."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from comparator.training.settings import SETTINGS, TrainSettings
from comparator.training.types import TrainRequest
from comparator.types import Problem

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


def settings(given: TrainSettings) -> None:
    """Every field has its type and is within its range."""
    for known in SETTINGS:
        value = getattr(given, known.name)
        if known.kind == "choice":
            if value not in known.choices:
                raise Problem(f"{known.title} is “{value}”.", f"It is one of {', '.join(known.choices)}.")
        elif known.kind == "names":
            if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
                raise Problem(f"{known.title} is {value!r}.", "It is a list of names.")
        elif known.kind in ("int", "float"):
            right = isinstance(value, (int, float) if known.kind == "float" else int) and not isinstance(
                value, bool
            )
            low, high = known.minimum or 0, known.maximum if known.maximum is not None else math.inf
            if not right or not low <= value <= high:
                raise Problem(f"{known.title} is {value}.", f"It goes from {low:g} to {high:,.12g}.")
        elif not isinstance(value, bool) and not (value is None and known.kind == "bool-or-auto"):
            raise Problem(f"{known.title} is {value!r}.", "It is on or off.")
    if given.learning_rate == 0:
        raise Problem("The learning rate is 0, which learns nothing.", "2e-4 is a good start.")
    if given.dropout and given.dora and given.dropout > 0.5:
        raise Problem("A dropout above 0.5 with DoRA leaves little to learn from.", "Lower the dropout.")


def from_words(values: dict[str, Any]) -> TrainSettings:
    """Settings from plain values, as the command line and the page have them. Raises `Problem` for unknown names."""
    import difflib

    known = {f.name for f in fields(TrainSettings)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise Problem(
                f"There is no setting “{name}”.",
                f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}.",
            )
    made = TrainSettings(**values)
    settings(made)
    return made


def name(text: str, taken: set[str]) -> None:
    """An adapter's name: a folder's, and a word of the adapter notation."""
    if not _NAME.fullmatch(text) or ":" in text:
        raise Problem(
            f"“{text[:80]}” cannot be the name of an adapter.",
            "Up to 64 letters, digits, dots, dashes and underscores, beginning with a letter or a digit.",
        )
    if text.lower() in {t.lower() for t in taken}:
        raise Problem(f"{text} is there already.", "Choose another name: nothing is overwritten.")


def free_name(request: TrainRequest, taken: set[str]) -> str:
    """`pirate-nf4-dq`, with a number where that is taken."""
    stem = Path(request.data.title).name
    stem = stem.rsplit(".", 1)[0] if "." in stem else stem
    words = f"{stem}-{request.base.partition('@')[0]}"
    plain = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower()[:48].strip("-") or "adapter"
    used = {t.lower() for t in taken}
    if plain not in used:
        return plain
    return next(n for i in range(2, 10_000) if (n := f"{plain}-{i}") not in used)


def output(target: Path) -> None:
    """A folder of one's own: new or empty, and writable."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Problem(f"{target} is there already.", "Name a new folder: nothing is overwritten.")
    above = next(p for p in target.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise Problem(f"{above} cannot be written to: {error.strerror}.", "Choose another folder.") from None
