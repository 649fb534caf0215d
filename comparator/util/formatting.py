"""Numbers and errors → text for people.

Bytes are shown in MB = 10^6 bytes everywhere; what was not measured is "–".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "–"
CLOSE = 0.02  # a ratio nearer to 1 than this is "about the same"


def figure(value: float | None, unit: str = "") -> str:
    """Three significant digits: 269, 15.1, 7.32; thousands grouped. "–" for None."""
    if value is None:
        return NONE
    size = abs(value)
    digits = 0 if size >= 99.95 or size == 0 else 1 if size >= 9.995 else 2
    return f"{value:,.{digits}f}" + (f" {unit}" if unit else "")


def megabytes(value: int | None, unit: bool = True) -> str:
    """Bytes as MB = 10^6."""
    return NONE if value is None else figure(value / 1e6, "MB" if unit else "")


def exact_bytes(value: int | None) -> str:
    return NONE if value is None else f"{value:,} bytes"


def few_bytes(value: int | None) -> str:
    """MB, or exact bytes below 0.1 MB."""
    return exact_bytes(value) if value is not None and 0 < abs(value) < 1e5 else megabytes(value)


def seconds(value: float | None) -> str:
    """Milliseconds below a second, seconds above."""
    if value is None:
        return NONE
    return figure(value, "s") if value >= 0.9995 else figure(value * 1e3, "ms")


def duration(seconds: float | None) -> str:
    """A time that somebody waits: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return NONE
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def rounded_duration(seconds: float) -> float:
    """As exact as an estimate is: to 1 s below 10 s, 5 s below a minute, else 10 s; at least that."""
    step = 1 if seconds < 10 else 5 if seconds < 60 else 10
    return max(step, step * round(seconds / step))


def prompt_of(number: int, total: int, left_s: float | None) -> str:
    """ "prompt 3 of 40, about 2 min left"."""
    left = "" if left_s is None else f", about {duration(left_s)} left"
    return f"prompt {number:,} of {total:,}{left}"


def count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def parameters(value: int | None) -> str:
    """134,515,008 → "135 M"; 8,030,261,248 → "8.03 B"."""
    if value is None:
        return NONE
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{figure(value / size)} {unit}"
    return str(value)


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value * 100:.1f} %"


def ratio(value: float | None, reference: float | None) -> float | None:
    """Value over reference; None where either is missing or the reference is 0."""
    return value / reference if value is not None and reference else None


def times(share: float | None, mark: str = "") -> str:
    """A ratio as shown after a figure: ×0.48, followed by `mark`."""
    return "" if share is None else f"×{share:,.{2 if share < 99.5 else 0}f}{mark}"


def small(value: float | None, digits: int = 3) -> str:
    """A divergence with `digits` significant digits, however small."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4:
        return f"{value:.1e}"
    places = min(7, max(0, digits - 1 - math.floor(math.log10(size))))
    return f"{value:.{places}f}"


def judged(share: float | None, less: str, more: str) -> str:
    """A ratio as a word: `less` below 1, `more` above, "same" within 2 % of 1."""
    if share is None:
        return ""
    if abs(share - 1) < CLOSE:
        return "same"
    return less if share < 1 else more


def amount(share: float | None, what: str = "") -> str:
    """A ratio of amounts in words: "39 % less memory", "12 % more memory", "2.31× the memory", "same memory"."""
    if share is None:
        return ""
    if abs(share - 1) < CLOSE:
        words = "same"
    elif share < 2:
        words = f"{abs(share - 1) * 100:.0f} % {'less' if share < 1 else 'more'}"
    else:
        words = f"{figure(share)}× {'the' if what else 'as much'}"
    return f"{words} {what}".strip()


def pace(times_as_fast: float) -> str:
    """A ratio of speeds in words: "1.45× as fast", "16.9× slower"."""
    return (
        f"{figure(times_as_fast)}× as fast" if times_as_fast >= 1 else f"{figure(1 / times_as_fast)}× slower"
    )


def join(parts: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    listed = [p for p in parts if p]
    return (
        listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} {last} {listed[-1]}" if listed else ""
    )


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error says in its first line, at most so many characters; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
