"""An adapter's source → a local folder: built in, on this machine, or a Hub repo. Judges nothing but the files.

Pickles are refused by name, because they can run code.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from comparator.core.errors import UserError
from comparator.core.settings import Settings, get_settings
from comparator.core.variant import Adapter
from comparator.sources.checkpoint import Progress

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MOST_CONFIG_BYTES = 4_000_000  # one has some kB
MOST_BYTES = 20_000_000_000  # with whole embeddings of the largest models beside it
_OPENER = "comparator.adapters.describe:open_in_child"
_DATA = Path(__file__).resolve().parent.parent / "data" / "adapters"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on this machine's disk. `source` as it was named; `revision` is the commit of a Hub repo."""

    source: str
    path: Path
    revision: str | None = None


def builtin_names() -> list[str]:
    """The adapters that come with the project; they fit the built-in model."""
    return sorted(p.name for p in _DATA.iterdir() if (p / CONFIG).is_file()) if _DATA.is_dir() else []


def trained_folder(settings: Settings | None = None) -> Path:
    """Where adapters that were trained here lie, a folder each."""
    return (settings or get_settings()).data_dir / "adapters"


def trained_names(settings: Settings | None = None) -> list[str]:
    """The adapters that were trained here. A folder is whole or absent; what begins with a dot is being written."""
    folder = trained_folder(settings)
    try:
        found = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError:
        return []
    return sorted(n for n in found if all((folder / n / f).is_file() for f in (CONFIG, WEIGHTS)))


def builtin_path(name: str) -> Path:
    """The folder of a built-in adapter. Raises `UserError` for an unknown name."""
    if name not in builtin_names():
        raise _unknown(name)
    return _DATA / name


def open_adapter(
    adapter: Adapter, *, progress: Progress | None = None, settings: Settings | None = None
) -> AdapterFiles:
    """Bring an adapter onto this machine's disk. The rule, in this order:

    1. A built-in name.
    2. The name of an adapter that was trained here.
    3. Local: what starts with `/`, `.` or `~`, contains a backslash, or exists as it is written.
    4. A Hub repo, `user/name`, at the adapter's revision.

    Raises `UserError`; `progress(fraction or None, message)` may raise `Stopped`.
    """
    settings = settings or get_settings()
    text = adapter.source.strip()
    if text.lower() in builtin_names():
        if adapter.revision:
            raise UserError(f"{text} is built in and has no revisions.", f"Write {text} alone.")
        return AdapterFiles(text.lower(), builtin_path(text.lower()))
    if text in trained_names(settings):
        if adapter.revision:
            raise UserError(f"{text} was trained here and has no revisions.", f"Write {text} alone.")
        return AdapterFiles(text, trained_folder(settings) / text)
    if _is_local(text, settings.public):
        return _local(text, adapter.revision, settings)
    if text.count("/") != 1:
        raise _unknown(text, settings)
    return _from_hub(text, adapter.revision, progress or (lambda fraction, message: None))


def _is_local(text: str, public: bool) -> bool:
    if text.startswith(("/", ".", "~")) or "\\" in text or text[1:3] in (":/", ":\\"):
        return True
    return not public and Path(text).exists()


def _local(text: str, revision: str | None, settings: Settings) -> AdapterFiles:
    if settings.public:
        raise UserError(
            "Files and folders of the server cannot be opened here, because this is a public installation.",
            "Name a Hub repo (user/name) or a built-in adapter, or run the app on your own machine.",
        )
    path = Path(os.path.expanduser(text)).absolute()
    if path.is_file() and path.name in (CONFIG, WEIGHTS):
        path = path.parent
    if path.is_file():
        kind = "A pickle can run code when it is opened. " if path.suffix in (".bin", ".pt", ".pth") else ""
        raise UserError(f"{text} is a file.", f"{kind}Name the folder that contains {CONFIG} and {WEIGHTS}.")
    if not path.is_dir():
        raise UserError(f"There is no folder {text}.", "Check the path; ~ and relative paths work.")
    if revision:
        raise UserError(
            f"{text} is a folder and has no revision “{revision}”.", "Remove everything after the @."
        )
    try:
        names = [p.name for p in path.iterdir()]
    except OSError as error:
        raise UserError(
            f"The folder {text} cannot be read: {error.strerror}.", "Check its permissions."
        ) from None
    check_names(names, text)
    return AdapterFiles(text, path.resolve())


def check_names(names: list[str], source: str) -> None:
    """Whether a folder or repo with these files is an adapter that can be opened. Raises `UserError`."""
    if CONFIG not in names:
        if WEIGHTS in names or PICKLE in names:
            raise UserError(
                f"{source} has adapter weights but no {CONFIG}, which describes them.",
                "Copy the file from where the adapter was trained, or save it again with save_pretrained.",
            )
        if "config.json" in names:
            raise UserError(
                f"{source} is a whole model, not an adapter: it has config.json and no {CONFIG}.",
                "Choose it as the model instead.",
            )
        checkpoints = sorted(n for n in names if n.startswith("checkpoint-"))
        inside = f"Is it {source}/{checkpoints[-1]}? " if checkpoints else ""
        raise UserError(
            f"{source} is not an adapter: it has no {CONFIG}.", f"{inside}Name the folder that peft saved."
        )
    if WEIGHTS not in names:
        if PICKLE in names:
            raise UserError(
                f"{source} has its weights as {PICKLE}, a pickle. Pickles are not opened, because they can run code.",
                f"Use an adapter in safetensors, or, where you trust it, load it with peft and save it again: "
                f"save_pretrained(folder) writes {WEIGHTS}.",
            )
        raise UserError(f"{source} has no {WEIGHTS}.", "Save the adapter again with peft's save_pretrained.")


def _from_hub(repo: str, revision: str | None, progress: Progress) -> AdapterFiles:
    from comparator.sources import hub, hub_problems, logins_are_possible
    from comparator.sources.hub_files import cache_dir, fetch, remember_branch

    source = f"{repo}@{revision}" if revision else repo
    progress(None, f"asking the Hub for {source}")
    try:
        listing = hub.list_repo(repo, revision, progress)
    except hub_problems.Unreachable:
        from huggingface_hub import try_to_load_from_cache

        found = [
            try_to_load_from_cache(repo, name, cache_dir=cache_dir(), revision=revision or "main")
            for name in (CONFIG, WEIGHTS)
        ]
        if not all(isinstance(f, str) for f in found) or logins_are_possible():
            raise
        return _opened(AdapterFiles(source, Path(found[0]).parent, Path(found[0]).parent.name), progress)
    check_names([n for n in listing.files if "/" not in n], source)
    for name, most in ((CONFIG, MOST_CONFIG_BYTES), (WEIGHTS, MOST_BYTES)):
        if listing.files[name] > most:
            size = f"{listing.files[name] / 1e6:,.0f} MB; at most {most / 1e6:,.0f} MB are accepted"
            raise UserError(f"{name} of {source} has {size}.", "Choose another adapter.")
    path = fetch(listing, [CONFIG, WEIGHTS], progress, f"downloading {source}: ")
    remember_branch(path, revision, listing.commit)
    return _opened(AdapterFiles(source, path, listing.commit), progress)


def _opened(files: AdapterFiles, progress: Progress) -> AdapterFiles:
    """The files again: a stranger's are read in another process before this one reads them. Raises `UserError`."""
    from comparator.sources import isolated

    if isolated.needed(files.revision):
        isolated.open_first(files.path, files.source, progress, _OPENER, isolated.beside)
    return files


def _unknown(text: str, settings: Settings | None = None) -> UserError:
    trained = trained_names(settings) if settings and not settings.public else []
    near = difflib.get_close_matches(text.lower(), [*builtin_names(), *trained], n=1)
    meant = f"Did you mean {near[0]}? " if near else ""
    here = f" ({', '.join(trained[:8])})" if trained else ""
    return UserError(
        f"There is no adapter “{text[:200]}”.",
        f"{meant}Name a built-in adapter ({', '.join(builtin_names())}), one that was trained here{here}, a Hub repo (user/name or "
        "user/name@revision) or a folder.",
    )
