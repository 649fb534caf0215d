"""Patterns of strangers: a small grammar of regular expressions, matched within a time limit.

Python's `re` has no limit and holds the interpreter lock while it matches: `(a*)*b` stops everybody. Here a pattern has to
fit a grammar without the parts that make matching hard to bound (back references, lookarounds, recursion), and what is left
is matched by `regex`, which gives up after `SECONDS` and lets other threads run meanwhile.
"""

from __future__ import annotations

import re

SECONDS = 0.2
LONGEST = 300
MOST_REPEATS = 200
_FORBIDDEN = (
    (re.compile(r"\(\?(?!:|i\))"), "groups that start with (? are not supported, apart from (?: and (?i)"),
    (re.compile(r"\\[1-9gkLKGRXNpP]"), "back references and named classes are not supported"),
    (re.compile(r"\[\[|&&|\|\||~~|--"), "set operations are not supported"),
    (re.compile(r"[*+?}][*+?]{2}|\*\*|\+\+|\?\+|\}\+"), "possessive and doubled repeats are not supported"),
)
_BRACES = re.compile(r"\{([^{}]*)\}")


def refusal(pattern: str) -> str | None:
    """Why a pattern is not taken, as a clause; None where it is."""
    if len(pattern) > LONGEST:
        return f"the pattern has {len(pattern):,} characters, more than {LONGEST}"
    bare = re.sub(r"\\[^A-Za-z0-9]", "_", pattern)  # escaped punctuation is a literal
    for part, reason in _FORBIDDEN:
        if part.search(bare):
            return reason
    repeats = 1
    for inner in _BRACES.findall(bare):
        if not re.fullmatch(r"\d{1,3}(,\d{0,3})?", inner, re.ASCII):
            return "braces contain one number or two; a literal brace is written \\{"
        repeats *= max(1, *(int(n) for n in inner.split(",") if n))
    if repeats > MOST_REPEATS:
        return f"its nested repeats multiply to {repeats:,}, more than {MOST_REPEATS}"
    import regex

    try:
        regex.compile(pattern, regex.VERSION0)
    except regex.error as error:
        return f"it is not a pattern: {error}"
    return None


def search(pattern: str, text: str) -> str | None:
    """None where the pattern is found in the text, else why not."""
    import regex

    if why := refusal(pattern):
        return why
    try:
        found = regex.compile(pattern, regex.VERSION0).search(text, timeout=SECONDS, concurrent=True)
    except TimeoutError:
        return f"the pattern took more than {SECONDS} s"
    return None if found else "the pattern is not found"
