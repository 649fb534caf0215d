"""Numbers as people type them: "32k" tokens, "1,4,16", "50ms"."""

from __future__ import annotations

import re

from comparator.core.errors import UserError

_FACTORS = {"": 1, "k": 1024, "m": 1024**2}


def tokens(text: str) -> int:
    """ "512", "4k" (4,096), "1m" → tokens. Raises `UserError`."""
    match = re.fullmatch(r"(\d{1,9})\s*([km]?)", str(text).strip().lower().replace(",", "").replace("_", ""))
    if not match or int(match[1]) == 0:
        raise UserError(
            f"“{str(text)[:40]}” is not a number of tokens.", "Write 512, 4k or 32k (k is 1,024)."
        )
    return int(match[1]) * _FACTORS[match[2]]


def several(text: str) -> tuple[int, ...]:
    """ "1,4,16" or "512,4k", ascending and each once. Raises `UserError`."""
    return tuple(sorted({tokens(part) for part in str(text).split(",") if part.strip()}))


def seconds(text: str) -> float:
    """ "50ms", "0.5s", "0.5" → seconds. Raises `UserError`."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*(ms|s|)", str(text).strip().lower())
    value = float(match[1]) * (1e-3 if match[2] == "ms" else 1) if match else 0
    if value <= 0:
        raise UserError(f"“{str(text)[:40]}” is not a time.", "Write 50ms or 0.5s.")
    return value


def short(count: int) -> str:
    """4096 → "4k"; 500 → "500"."""
    return f"{count // 1024:,}k" if count % 1024 == 0 and count else f"{count:,}"
