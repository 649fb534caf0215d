"""Numbers as people type them: "32k" tokens, "1,4,16", "50ms"."""

from __future__ import annotations

import re

from comparator.core.errors import UserError

_FACTORS = {"": 1, "k": 1024, "m": 1024**2}
_MOST_CHARACTERS = 1000  # a field holds a few numbers, and a stranger may send megabytes into it


def tokens(text: str) -> int:
    """ "512", "4k" (4,096), "1m" → tokens. Raises `UserError`."""
    plain = _plain(text).lower().replace(",", "").replace("_", "")
    match = re.fullmatch(r"(\d{1,9})\s*([km]?)", plain)
    if not match or int(match[1]) == 0:
        raise UserError(
            f"“{str(text)[:40]}” is not a number of tokens.", "Write 512, 4k or 32k (k is 1,024)."
        )
    return int(match[1]) * _FACTORS[match[2]]


def several(text: str) -> tuple[int, ...]:
    """ "1,4,16" or "512,4k", ascending and each once. Raises `UserError`."""
    return tuple(sorted({tokens(part) for part in _plain(text).split(",") if part.strip()}))


def seconds(text: str) -> float:
    """ "50ms", "0.5s", "0.5" → seconds. Raises `UserError`."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*(ms|s|)", _plain(text).lower())
    value = float(match[1]) * (1e-3 if match[2] == "ms" else 1) if match else 0
    if value <= 0:
        raise UserError(f"“{str(text)[:40]}” is not a time.", "Write 50ms or 0.5s.")
    return value


def _plain(text: object) -> str:
    if isinstance(text, str) and len(text) > _MOST_CHARACTERS or isinstance(text, (list, dict)):
        raise UserError("These are too many numbers for one field.", "Write a few, such as 1,4,16.")
    return str(text).strip()


def short(count: int) -> str:
    """4096 → "4k"; 500 → "500"."""
    return f"{count // 1024:,}k" if count % 1024 == 0 and count else f"{count:,}"
