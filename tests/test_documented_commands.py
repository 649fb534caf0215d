"""Every command in the documents is one that exists: its options are taken, its variants, files and targets are there.

What they print is tested where the command is; the curl example runs in `tests/ui/test_api.py`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from comparator.backends import resolve
from comparator.cli import app
from comparator.core.variant import parse_adapter

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def commands() -> list[tuple[str, str]]:
    """(document, command), continued lines joined; of fenced blocks, and of inline code that is whole."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        found += [(document.name, line) for line in lines if re.match(STARTS, line)]
    return found


STARTS = r"(?:[A-Z_]+=\S+ )*(?:python (?:-m comparator|scripts/|spaces/|app\.py)|make [a-z]|pip install -r)"


def words_of(command: str) -> list[str]:
    """Without variables, redirections and comments; … stands for a value."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    for sign in ("<", ">", "|", "&&", "→"):
        words = words[: words.index(sign)] if sign in words else words
    if command.endswith(" …"):
        words.pop()
    return [] if "--help" in words else [word for word in words if not re.search(r"[\[\]]", word)]


def check_ours(arguments: list[str]) -> None:
    group = typer.main.get_command(app)
    if not arguments:
        return
    name, *rest = arguments
    assert name in group.commands, f"there is no command {name}"
    command = group.commands[name]
    if not rest:  # named in a sentence
        return
    values = command.make_context(name, rest).params
    variants = [v for key in ("variant", "variants") for v in _listed(values.get(key)) if isinstance(v, str)]
    for variant in (v for text in variants for v in text.split()):
        resolve(variant.replace("FOLDER", "./folder"))
    for adapter in _listed(values.get("adapter")):
        parse_adapter(adapter)


def _listed(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def check_script(file: str, arguments: list[str]) -> None:
    assert (ROOT / file).is_file(), f"there is no {file}"
    source = (ROOT / file).read_text(encoding="utf-8")
    for option in (a.partition("=")[0] for a in arguments if a.startswith("--")):
        assert f'"{option}"' in source, f"{file} has no {option}"


@pytest.mark.parametrize("document", [d.name for d in DOCUMENTS])
def test_the_documented_commands_are_taken(document):
    for command in [command for name, command in commands() if name == document]:
        try:
            check(command)
        except Exception as error:
            error.add_note(f"of {document}: {command}")
            raise


def check(command: str) -> None:
    words = words_of(command)
    if not words:
        return
    if words[:3] == ["python", "-m", "comparator"]:
        check_ours(words[3:])
    elif words[0] == "python":
        check_script(words[1], words[2:])
    elif words[0] == "make":
        assert words[1] in TARGETS, f"the Makefile has no {words[1]}"
    else:
        for file in re.findall(r"-r (\S+)", command):
            assert (ROOT / file).is_file(), f"there is no {file}"


def test_there_are_commands():
    assert len(commands()) > 80, "the documents hold hardly any command: this test reads them wrongly"
