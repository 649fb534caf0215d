"""What a model's name means: built in, a GGUF file, a local folder, or a Hub repo. Looks, opens nothing."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL
from comparator.core.settings import Settings
from comparator.sources import weights

BUILTIN_NAMES = (BUILTIN_MODEL,)
_REPO = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?/)?[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")  # a branch, a tag, a commit, refs/pr/4
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx")


_ORIGINALS = {BUILTIN_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # built-in name → the model on the Hub


def public_name(source: str) -> str:
    """A model's name for a file that leaves this machine: of a folder its last part, since a path does not travel."""
    if source in _ORIGINALS:
        return _ORIGINALS[source]
    is_path = source.startswith(("/", ".", "~")) or "\\" in source or Path(source).exists()
    return Path(source).name if is_path else source


@dataclass(frozen=True)
class Name:
    """`text` is the name without its revision: a built-in name, a repo id, or a path as the person wrote it.

    `inside` is where the model lies, where that is not the path itself: the folder of a weights file, a snapshot.
    """

    kind: Literal["builtin", "gguf", "folder", "hub"]
    text: str
    revision: str | None = None
    inside: Path | None = None

    @property
    def path(self) -> Path:
        return self.inside or Path(os.path.expanduser(self.text)).absolute()


def parse(given: str, settings: Settings) -> Name:
    """The rule, in this order:

    1. A built-in name.
    2. Local: what starts with `/`, `.` or `~`, contains a backslash, ends in `.gguf`, or exists as it is written.
    3. A Hub repo, `user/name` or `name`, with an optional `@revision`.

    Raises `UserError` for anything else, and for a local path in public mode.
    """
    text = given.strip()
    if not text:
        raise UserError(
            "No model is named.", f"Name one: {BUILTIN_MODEL}, a Hub repo (user/name) or a folder."
        )
    if text.lower() in BUILTIN_NAMES:
        name = Name("builtin", text.lower())
    elif _is_local(text, settings.public):
        if settings.public:
            raise UserError(
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
    return name


def unknown(text: str, near: list[str] | None = None) -> UserError:
    near = _near(text) if near is None else near
    meant = f"Did you mean {near[0]}? " if near else ""
    return UserError(
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
        raise UserError(
            f"There is no {kind} {text}.", "Check the path; ~ and paths relative to where the app runs work."
        )
    if name.kind == "gguf" and name.path.is_dir():
        return Name("folder", text)
    if name.kind == "folder" and name.path.is_file():
        return _of_file(name)
    return replace(name, inside=_snapshot(name)) if name.kind == "folder" else name


def _of_file(name: Name) -> Name:
    """The folder that a file of a checkpoint belongs to."""
    path = name.path
    if path.suffix.lower() in _PICKLES:
        raise UserError(
            f"{path.name} is a {path.suffix} file. Weights are read from safetensors or GGUF only: "
            "a pickle can run code when it is opened.",
            "Convert it with transformers, save_pretrained(folder), and name the folder.",
        )
    chosen = weights.choose([p.name for p in path.parent.iterdir()])
    parts = (
        weights.index_of(path.parent / chosen[0]).values() if chosen and chosen[0].endswith(".json") else ()
    )
    if path.name in (*chosen, *parts, "config.json") and (path.parent / "config.json").is_file():
        return replace(name, inside=path.parent)
    if path.suffix == ".safetensors":
        used = (
            f"{chosen[0]} is what would be loaded from there"
            if chosen
            else f"transformers looks for {weights.SINGLE}"
        )
        raise UserError(
            f"{path.name} is not the weights of a model in {path.parent}: {used}, with config.json beside it.",
            "Name a folder that contains config.json and only these weights.",
        )
    raise UserError(f"{name.text} is a file.", "Name the folder that contains config.json, or a .gguf file.")


def _snapshot(name: Name) -> Path | None:
    """The newest snapshot in a repo's folder of the Hub cache (models--user--name), or in its `snapshots`."""
    path = name.path
    repo = path.parent if path.name == "snapshots" else path
    if not (repo.name.startswith("models--") and not (repo / "config.json").exists()) and path == repo:
        return None
    main = repo / "refs" / "main"
    found = [p for p in (repo / "snapshots").glob("*") if p.is_dir()]
    if main.is_file() and (commit := repo / "snapshots" / main.read_text()[:64].strip()) in found:
        return commit
    if not found:
        raise UserError(
            f"{name.text} is a folder of the Hub's cache without a snapshot.",
            f"Name the model as the Hub does: {repo.name.removeprefix('models--').replace('--', '/')}",
        )
    return max(found, key=lambda p: p.stat().st_mtime)


def _is_repo_id(text: str) -> bool:
    """The Hub's own grammar: at most 96 characters a part, no `--`, no `..`, no `.git` at the end."""
    if not _REPO.fullmatch(text) or "--" in text or ".." in text or text.endswith(".git"):
        return False
    return all(len(part) <= 96 for part in text.split("/"))
