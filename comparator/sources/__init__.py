"""Where models come from: the built-in one, a Hub repo, a local folder, a GGUF file → `Checkpoint`.

Looks at configs and safetensors headers only; loads no weights. Importing this imports nothing heavy, and neither
does opening a folder or a file that was converted before.
"""

from __future__ import annotations

from comparator.core.errors import UserError
from comparator.core.settings import Settings, get_settings
from comparator.core.state import ModelFacts
from comparator.sources import builtin, folder, gguf, hub, hub_headers, naming
from comparator.sources.checkpoint import Checkpoint, Progress, TensorInfo
from comparator.sources.hub import search_hub
from comparator.sources.hub_login import logins_are_possible

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "builtin_names",
    "is_here",
    "logins_are_possible",
    "look_up",
    "on_disk",
    "open_checkpoint",
    "open_headers",
    "search_hub",
]


def builtin_names() -> list[str]:
    return list(naming.BUILTIN_NAMES)


def open_checkpoint(
    name: str, *, progress: Progress | None = None, settings: Settings | None = None
) -> Checkpoint:
    """Bring a model onto this machine's disk, as far as it is not there, and say what it is.

    `name`: a built-in name, `user/name[@revision]`, a folder, or a .gguf file; `naming.parse` holds the rule.
    `progress(fraction or None, message)` may raise `Stopped`, which passes through with nothing left half-written.
    Raises `UserError` for everything that makes a model unusable here.
    """
    settings = settings or get_settings()
    progress = progress or _silent
    named = naming.parse(name, settings)
    if named.kind == "builtin":
        return builtin.open_builtin(named.text, settings.cache_dir, progress)
    if named.kind == "gguf":
        return gguf.open_gguf(named.path, named.text, settings.cache_dir, progress)
    if named.kind == "folder":
        return folder.inspect(named.path, named.text)
    return hub.open_repo(named.text, named.revision, progress)


def open_headers(
    name: str, *, progress: Progress | None = None, settings: Settings | None = None
) -> Checkpoint:
    """As `open_checkpoint`, without downloading weights: of a Hub model that is not here, config and headers alone are read.

    Such a checkpoint can be planned for and not loaded. Raises `UserError`.
    """
    settings, progress = settings or get_settings(), progress or _silent
    named = naming.parse(name, settings)
    if named.kind != "hub":
        return open_checkpoint(name, progress=progress, settings=settings)
    return hub.in_cache(named.text, named.revision) or hub_headers.open_headers(
        named.text, named.revision, progress
    )


def look_up(name: str, *, settings: Settings | None = None) -> ModelFacts:
    """What can be told of a model without converting or downloading its weights: for a form, as someone types.

    Raises `UserError` as `open_checkpoint` does, as far as the small files tell.
    """
    settings = settings or get_settings()
    named = naming.parse(name, settings)
    if named.kind == "builtin":
        return builtin.builtin_facts(named.text)
    if named.kind == "gguf":
        return gguf.gguf_facts(named.path, named.text)
    if named.kind == "folder":
        return folder.inspect(named.path, named.text).facts()
    return hub.look_up(named.text, named.revision)


def on_disk(name: str, settings: Settings) -> Checkpoint | None:
    """The checkpoint where nothing has to be downloaded or converted first, else None. Raises `UserError`."""
    named = naming.parse(name, settings)
    if named.kind == "hub":
        return hub.in_cache(named.text, named.revision)
    if named.kind in ("builtin", "gguf"):
        file, key = builtin.find_gguf() if named.kind == "builtin" else (named.path, None)
        if not gguf.converted_path(file, settings.cache_dir, key).exists():
            return None
    return open_checkpoint(name, settings=settings)


def is_here(name: str, *, settings: Settings | None = None) -> bool:
    """Whether the model is on this machine, so that nothing has to be downloaded. Asks nobody else; raises nothing."""
    settings = settings or get_settings()
    try:
        named = naming.parse(name, settings)
        if named.kind == "hub":
            return hub.in_cache(named.text, named.revision) is not None
        look_up(name, settings=settings)
        return True
    except UserError:
        return False


def _silent(fraction: float | None, message: str) -> None:
    pass
