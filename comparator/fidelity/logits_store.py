"""The reference's logits on disk, where it and a column do not fit on the device together, and the folder that
holds them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.core.errors import UserError

if TYPE_CHECKING:
    from comparator.fidelity.logits_store import StoredLogits


@dataclass(frozen=True)
class StoredLogits:
    """Logits on disk: `count` rows of `vocabulary` values, in the dtype they were computed in."""

    path: str
    count: int
    vocabulary: int
    dtype: str

    @property
    def bytes(self) -> int:
        width = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return self.count * self.vocabulary * width

    def rows(self, start: int, end: int) -> Any:
        """Rows start..end as a tensor on the host, read now. Raises OSError where the file is gone or short."""
        import torch

        kind = getattr(torch, self.dtype)
        size = torch.empty((), dtype=kind).element_size()
        wanted = (end - start) * self.vocabulary
        with open(self.path, "rb") as file:
            file.seek(start * self.vocabulary * size)
            data = bytearray(file.read(wanted * size))
        if len(data) != wanted * size:
            raise OSError(f"{self.path} is shorter than it should be")
        return torch.frombuffer(data, dtype=kind).view(end - start, self.vocabulary)


class LogitsWriter:
    """Writes rows of logits to a file as they come. `kept()` says what is there."""

    def __init__(self, path: Path | str):
        self.path, self.count, self.vocabulary, self.dtype = Path(path), 0, 0, "float32"
        self._file = self.path.open("wb")

    def add(self, logits: Any) -> None:
        """`logits` (n, vocabulary), any device and float dtype."""
        import torch

        host = logits.detach().to("cpu").contiguous()
        self.vocabulary, self.dtype = host.shape[-1], str(host.dtype).removeprefix("torch.")
        self._file.write(memoryview(host.view(torch.uint8).numpy()).cast("B"))
        self.count += len(host)

    def kept(self) -> StoredLogits:
        self._file.close()
        return StoredLogits(str(self.path), self.count, self.vocabulary, self.dtype)

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def scores_folder(cache: Path) -> Path:
    """A new folder for scores, that of this process alone. Raises `UserError` where none can be made."""
    parent = cache / "scores"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-{_machine()}-", dir=parent))
    except OSError as error:
        raise UserError(
            f"The reference's scores cannot be kept under {parent}: {error.strerror or error}.",
            "Set COMPARATOR_CACHE_DIR to a folder that can be written to.",
        ) from None


def remove_leftovers(parent: Path) -> None:
    """Scores of processes that are gone; of this machine, since others may keep theirs in the same folder."""
    import psutil

    for folder in parent.iterdir():
        owner, _, rest = folder.name.partition("-")
        if owner.isdigit() and rest.startswith(f"{_machine()}-") and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
