"""The words of the project: what an ML engineer says, in strings, docstrings, README and docs, and in names.

Every entry of WORDS is a phrase that a reader has to translate, with what to write instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "comparator").rglob("*.py"))
TEMPLATES = sorted((ROOT / "comparator").rglob("*.html"))
PROSE = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

# what is banned (a regular expression, whole words, any case) → what to write instead
WORDS = {
    r"knows? nothing (of|about)": "nothing: the import contracts say it",
    r"recorded steps?|compiled and recorded|records its decode step": "captured CUDA graph",
    r"run side by side|runs? abreast|abreast": "on parallel streams",
    r"products that read": "matmuls that read",
    r"of the (bandwidth )?floor|% of floor|bandwidth floor": "% of peak memory bandwidth (MBU), roofline",
    r"(memory|bytes|MB)( \w+){0,3} c[ao]mes? back": "freed",
    r"throw(s|n)? (it |them |this run |an unfinished run )?away|threw": "discard",
    r"go(es)? on from": "resume",
    r"learnt": "trained on",
    r"held[- ]back": "held-out",
    r"breaks? the line": "new line",
    r"waits? for (its|their) turn|waits? in the same line|waits? in line": "queued",
    r"things? to know|what to know": "notes",
    r"\ba (row|line|sample|step|weight|column|second|node|layer|token|card|call|key|paragraph) a "
    r"(row|line|column|layer|tensor|sample|token|card|variant)": "one … per …",
    r"(bits|bytes?|MB|scale|float|seconds?|tokens|nats|calls|ms|steps?) a (weight|row|token|second|step|node|line|column|card)": "per",
    r"lands among": "is listed under",
    r"comes? with us|that we ship|the text we ship|shipped text": "built in, bundled",
    r"used longest ago": "least recently used",
    r"broke off|breaks off|broken off": "failed, interrupted",
    r"without saying why": "without an error message",
    r"hurts? most": "most sensitive",
    r"makes? room|to make room": "free memory",
    r"nothing is lost by it": "no data is lost",
    r"(are|is) told before": "are shown before",
    r"a person would say": "plain words",
    r"wardrobe|conductor|the door": "what the glossary names",
    r"shipped (set|prompts?)|prompts are shipped": "built in",
    r"gets? a word": "is called faster or slower only if the runs support it",
    r"(row|line) opens to": "open a row to read",
    r"is the box": "the type of the storage",
    r"begin again|take up an": "start over, resume",
    r"importing full|once: starting|cut at the limit|scores its answer": "Loading, Converting, limit reached, Scoring",
    r"hurts? it alone|changes it alone": "changes nothing else",
    r"anew": "again, re-…",
    r"(held|holds?) (it |them |\w+ estimate )?against": "compared with",
    r"what it holds|of it shared|what is kept free": "its memory, shared tensors, the reserve",
    r"likeliest": "most likely",
    r"(appear|given)s? so many times|stands? (twice|in every|beside transformers)|would stand in": "appears",
    r"somebody else's|nobody deleted|everybody together": "belongs to …, was not deleted, all visitors together",
    r"with commas between": "separated by commas",
    r"tells? nothing of|does not let us in": "does not report, refused access",
    r"put to the vote": "voted on",
    r"for good|will not outlive": "permanently, exists only on",
    r"of (its|their) own kind": "its own kind of",
    r"(is|are) asked for, but|holds? NaN|is no (number|text|id|list|time) ": "requested, contains, is not a",
    r"its maker": "its author",
    r"as long as they take|take a variant with you": "as many as fit into, export",
}

HEADINGS = {"In words", "Mind"}  # as a whole string: “Verdict”, “Warning”

# Where a banned phrase is right: (file, part of the line).
ALLOWED: tuple[tuple[str, str], ...] = ()

# Names that say nothing of what they hold, with their like.
NAMES = {
    "told", "said", "found", "given", "kept", "held", "seen", "worn", "wearing", "asked", "learnt", "gone", "lent", "door",
    "brought", "keeper", "abreast", "wardrobe", "conductor", "turns", "desk",
}  # fmt: skip
# Packages that are free of them; add a package when it is.
CLEAN = ("cli", "cluster", "core", "decoding", "reporting", "training", "ui", "util")


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string of a module, docstrings included; an f-string's values are left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            yield node.lineno, "".join(map(str, parts))


def names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, argument, attribute that is set, function and class of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def headings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is a banned heading."""
    return ((line, text) for line, text in strings(path) if text in HEADINGS)


def hits(text: str) -> list[tuple[str, str]]:
    """(what is banned, what to write instead), for each banned phrase in a text."""
    flat = re.sub(r"\s+", " ", text)
    found = []
    for pattern, instead in WORDS.items():
        if match := re.search(rf"\b(?:{pattern})\b", flat, re.IGNORECASE):
            found.append((match[0], instead))
    return found


def allowed(path: Path, text: str) -> bool:
    return any(path.match(where) and part in text for where, part in ALLOWED)


def report(path: Path, line: int, text: str) -> list[str]:
    if allowed(path, text):
        return []
    where = f"{path.relative_to(ROOT)}:{line}"
    return [f"{where}: “{phrase}”, better: {instead}" for phrase, instead in hits(text)]


def test_strings_and_docstrings_use_the_fields_own_words():
    wrong = {
        line for path in SOURCES for number, text in strings(path) for line in report(path, number, text)
    }
    wrong |= {
        f"{path.relative_to(ROOT)}:{n}: heading “{text}”" for path in SOURCES for n, text in headings(path)
    }
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("path", [*PROSE, *TEMPLATES], ids=lambda path: path.name)
def test_prose_uses_the_fields_own_words(path):
    paragraphs, number = path.read_text(encoding="utf-8").split("\n\n"), 1
    wrong = []
    for text in paragraphs:
        wrong += report(path, number, text)
        number += text.count("\n") + 2
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", CLEAN)
def test_names_say_what_they_hold(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "comparator" / package).rglob("*.py"))
        for line, name in names(path)
        if name in NAMES
    ]
    assert not wrong, "\n".join(wrong)


def test_a_banned_phrase_is_seen_whatever_its_form():
    assert (
        hits("It knows\n nothing of gradio.")
        and hits("Held back")
        and hits("one row a column, a row a column")
    )
    assert not hits("The GPU lock is released, and the text is found in the cache.")
