"""Which GGUF file a name means: the built-in one, a path, or one of a folder's or a Hub repo's files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources import builtin, naming
from comparator.sources.checkpoint import Progress


def find(source: str, revision: str | None, part: str | None, progress: Progress) -> Path:
    """The file, downloaded where it is on the Hub. `part`: its name, or a part of it that no other file there has.

    Raises `UserError` where there is none, or more than one; on a public installation without a list of allowed models
    also for the Hub's: llama.cpp reads a file in native code, which a stranger can write one for.
    """
    settings = get_settings()
    named = naming.parse(f"{source}@{revision}" if revision else source, settings)
    if named.kind == "hub" and settings.public and not settings.allowed_models:
        raise UserError(
            "This public installation does not run GGUF files from the Hub.",
            "Use gguf:q8_0, which is made here, or run Quant Comparator on your own machine.",
        )
    if named.kind == "builtin":
        return builtin.find_gguf()[0]
    if named.kind == "gguf":
        return named.path
    if named.kind == "folder":
        return named.path / choose([p.name for p in named.path.iterdir()], part, source)
    return _from_hub(named.text, named.revision, part, progress)


def here(source: str) -> Path | None:
    """The file where a name means one on this machine: the built-in model's, or a path. Raises nothing."""
    try:
        named = naming.parse(source, get_settings())
        if named.kind == "builtin":
            return builtin.find_gguf()[0]
        return named.path if named.kind == "gguf" else None
    except UserError:
        return None


def choose(names: Iterable[str], part: str | None, source: str) -> str:
    """The one model among file names."""
    files = sorted(n for n in names if n.lower().endswith(".gguf") and "mmproj" not in n.lower())
    matches = [n for n in files if n == part] or [n for n in files if (part or "").lower() in n.lower()]
    if len(matches) == 1:
        return matches[0]
    if not files:
        raise UserError(f"{source} contains no GGUF file.", "Name a .gguf file, or a repo that has one.")
    listed = ", ".join((matches or files)[:8])
    if not matches:
        raise UserError(f"{source} has no GGUF file named “{part}”.", f"It has {listed}.")
    raise UserError(
        f"{len(matches)} GGUF files of {source} {'match' if part else 'are possible'}: {listed}.",
        f"Name one: gguf@{source}:file={matches[0]}",
    )


def _from_hub(repo: str, revision: str | None, part: str | None, progress: Progress) -> Path:
    from comparator.sources import hub, hub_files, hub_problems

    try:
        listing = hub.list_repo(repo, revision, progress)
    except hub_problems.Unreachable:
        if folder := _downloaded(repo, revision):
            return folder / choose([p.name for p in folder.iterdir()], part, repo)
        raise
    name = choose(listing.files, part, repo)
    folder = hub_files.fetch(listing, [name], progress, f"downloading {name} of {repo}: ")
    hub_files.remember_branch(folder, revision, listing.commit)
    return folder / name


def _downloaded(repo: str, revision: str | None) -> Path | None:
    """The folder of what an earlier download left: huggingface_hub's own question wants the whole repo."""
    from huggingface_hub import constants

    from comparator.sources import hub_files

    root = Path(hub_files.cache_dir() or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = root / "refs" / (revision or "main")
    folder = root / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision or "main")
    return folder if folder.is_dir() else None
