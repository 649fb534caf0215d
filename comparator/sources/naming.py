"""What a model's name means: built in, a GGUF file, a local folder, or a Hub repo. Looks, opens nothing."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from comparator.settings import Settings
from comparator.types import BUILTIN_MODEL, Problem

BUILTIN_NAMES = (BUILTIN_MODEL,)
_REPO = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?/)?[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")  # a branch, a tag, a commit, refs/pr/4
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Name:
    """`text` is the name without its revision: a built-in name, a repo id, or a path as the person wrote it."""

    kind: Literal["builtin", "gguf", "folder", "hub"]
    text: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        return Path(os.path.expanduser(self.text)).absolute()


def parse(given: str, settings: Settings) -> Name:
    """The rule, in this order:

    1. A built-in name.
    2. Local: what starts with `/`, `.` or `~`, contains a backslash, ends in `.gguf`, or exists as it is written.
    3. A Hub repo, `user/name` or `name`, with an optional `@revision`.

    Raises `Problem` for anything else, and for what public mode or the allow-list refuses.
    """
    text = given.strip()
    if not text:
        raise Problem("No model is named.", f"Name one: {BUILTIN_MODEL}, a Hub repo (user/name) or a folder.")
    if text.lower() in BUILTIN_NAMES:
        name = Name("builtin", text.lower())
    elif _is_local(text, settings.public):
        if settings.public:
            raise Problem(
                "Files and folders of the server cannot be opened here, because this is a public installation.",
                "Name a Hub repo (user/name) or the built-in model, or run the app on your own machine.",
            )
        name = _local(text)
    else:
        repo, at, revision = text.partition("@")
        if not _is_repo_id(repo) or (at and not _REVISION.fullmatch(revision)) or ".." in revision:
            raise unknown(text)
        if "/" not in repo and (near := _near(repo)):
            raise unknown(text, near)
        name = Name("hub", repo, revision or None)
    _check_allowed(name, settings)
    return name


def unknown(text: str, near: list[str] | None = None) -> Problem:
    near = _near(text) if near is None else near
    meant = f"Did you mean {near[0]}? " if near else ""
    return Problem(
        f"There is no model “{text[:200]}”.",
        f"{meant}Name a built-in model ({', '.join(BUILTIN_NAMES)}), a Hub repo (user/name or user/name@revision), "
        "a folder (/path/to/folder) or a GGUF file.",
    )


def _near(text: str) -> list[str]:
    return difflib.get_close_matches(text.lower(), BUILTIN_NAMES, n=1, cutoff=0.7)


def _is_local(text: str, public: bool) -> bool:
    if text.startswith(("/", ".", "~")) or "\\" in text or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    if text.lower().endswith(".gguf"):
        return True
    # In public mode nobody may learn which folders exist, so a name that could be a repo is taken for one.
    try:
        return not public and Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or not one at all
        return False


def _local(text: str) -> Name:
    name = Name("gguf" if text.lower().endswith(".gguf") else "folder", text)
    if not name.path.exists():
        kind = "file" if name.kind == "gguf" else "folder"
        raise Problem(
            f"There is no {kind} {text}.", "Check the path; ~ and paths relative to where the app runs work."
        )
    if name.kind == "gguf" and name.path.is_dir():
        return Name("folder", text)
    if name.kind == "folder" and name.path.is_file():
        if name.path.suffix.lower() in _PICKLES:
            raise Problem(
                f"{name.path.name} is a {name.path.suffix} file. Weights are read from safetensors or GGUF only: "
                "a pickle can run code when it is opened.",
                "Convert it with transformers, save_pretrained(folder), and name the folder.",
            )
        raise Problem(f"{text} is a file.", "Name the folder that holds config.json, or a .gguf file.")
    return name


def _is_repo_id(text: str) -> bool:
    """The Hub's own grammar: at most 96 characters a part, no `--`, no `..`, no `.git` at the end."""
    if not _REPO.fullmatch(text) or "--" in text or ".." in text or text.endswith(".git"):
        return False
    return all(len(part) <= 96 for part in text.split("/"))


def _check_allowed(name: Name, settings: Settings) -> None:
    """The allow-list holds wherever one is set, public mode or not; the built-in model is named like the others."""
    patterns = [p.strip() for p in settings.allowed_models.split(",") if p.strip()]
    if not patterns or any(fnmatchcase(name.text.lower(), p.lower()) for p in patterns):
        return
    raise Problem(
        f"{name.text} is not among the models that this installation offers.",
        f"It offers {', '.join(patterns)}. Its operator sets this with COMPARATOR_ALLOWED_MODELS.",
    )
