"""What a disk may do to a program: fail at any step, or lose its power at any step. Real files, in a real folder.

`failing` has the n-th step (making, writing, flushing, renaming or removing a file or folder) refused by the system.
`power_cuts` keeps, after each step, what a disk would still hold had its power gone then: a file has what was last
flushed of it, and a folder the names that it had when it was last flushed. A disk may also have written more than it was
asked to, so each moment is kept in several ways. SQLite flushes its files without Python: they are there as they are, or
not at all.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STEPS = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "utime")
_REAL = {name: getattr(os, name) for name in STEPS}
_SQLITE = (".sqlite3", ".sqlite3-wal", ".sqlite3-shm")
WAYS = ("unflushed is lost", "names stay, unflushed content is lost", "some of each", "all is there")

Tree = dict[str, bytes | None]  # path below the root → content; None: a folder


@dataclass
class Failure:
    """`steps`: how many were taken; `name`: which of them was refused."""

    steps: int = 0
    name: str = ""


@contextmanager
def failing(root: Path, at: int, code: int = errno.EIO, *, for_good: bool = False) -> Iterator[Failure]:
    """The step number `at` (from 1) below `root` fails, and with `for_good` each after it as well."""
    seen = Failure()

    def step(name: str) -> None:
        seen.steps += 1
        if seen.steps == at or (for_good and seen.steps > at):
            seen.name = seen.name or name
            raise OSError(code, os.strerror(code))

    with _watched(root, before=step):
        yield seen


@dataclass(frozen=True)
class Cut:
    """What the disk holds when the power went after a step. `last`: the whole action had returned."""

    step: str
    way: str
    tree: tuple[tuple[str, bytes | None], ...]
    last: bool = False

    def lay_out(self, folder: Path) -> None:
        folder.mkdir()
        for path, content in self.tree:
            if content is None:
                (folder / path).mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)


@dataclass
class _Disk:
    """The flushed state of the files and folders below `root`, by inode, whose numbers are kept from being used anew."""

    root: Path
    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def flush(self, path: Path) -> None:
        if path.is_dir():
            self.folders[self._hold(path)] = {p.name: (self._hold(p), p.is_dir()) for p in path.iterdir()}
        else:
            self.files[self._hold(path)] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self.held:
            self.held[number] = _REAL["open"](path, os.O_RDONLY)
        return number

    def close(self) -> None:
        for handle in self.held.values():
            os.close(handle)

    def tree(self, way: str) -> Tree:
        chance = random.Random(len(self.held))
        found: Tree = {}
        self._add(found, self.root, "", self.root.stat().st_ino, way, chance)
        return found

    def _add(self, found: Tree, path: Path | None, name: str, number: int, way: str, chance) -> None:
        """`path`: where this folder is now, or None if only its flushed state is left."""
        found[name] = None
        now = {} if path is None else {p.name: (p.stat().st_ino, p.is_dir()) for p in path.iterdir()}
        names = self.folders.get(number, {})
        if path is not None and (way in WAYS[1::2] or (way == WAYS[2] and chance.random() < 0.5)):
            names = now
        for child, (child_number, is_folder) in sorted(names.items()):
            here = path / child if path is not None and now.get(child, (0,))[0] == child_number else None
            full = f"{name}/{child}".lstrip("/")
            if is_folder:
                self._add(found, here, full, child_number, way, chance)
            elif child.endswith(_SQLITE):
                if here is not None and way != WAYS[0]:
                    found[full] = here.read_bytes()
            else:
                found[full] = self._content(here, child_number, way, chance)

    def _content(self, here: Path | None, number: int, way: str, chance) -> bytes:
        flushed = self.files.get(number, b"")
        if here is None:
            return flushed
        if way == WAYS[3]:
            return here.read_bytes()
        if way == WAYS[2] and number not in self.files:
            content = here.read_bytes()
            return content[: chance.randint(0, len(content))]
        return flushed


@contextmanager
def power_cuts(root: Path) -> Iterator[list[Cut]]:
    """The cuts after each step below `root`; what is there at the beginning is on the disk. Equal ones are listed once."""
    disk, cuts, known = _Disk(root), [], set()
    for folder, _, files in os.walk(root):
        for file in files:
            disk.flush(Path(folder) / file)
        disk.flush(Path(folder))

    def after(name: str, path: Path | None) -> None:
        if name == "fsync" and path is not None:
            disk.flush(path)
        keep(name)

    def keep(step: str, last: bool = False) -> None:
        for way in WAYS:
            tree = tuple(sorted(disk.tree(way).items()))
            if (tree, last) not in known:
                known.add((tree, last))
                cuts.append(Cut(step, way, tree, last))

    try:
        with _watched(root, after=after):
            yield cuts
        keep("the end", last=True)
    finally:
        disk.close()


@contextmanager
def _watched(root: Path, before=lambda name: None, after=lambda name, path: None) -> Iterator[None]:
    """`before` and `after` are called around each step below `root`; what they do themselves is not watched."""
    inside = False

    def wrapped(name: str):
        real = _REAL[name]

        def call(target, *args, **kwargs):
            nonlocal inside
            path = None if inside else _path(target, kwargs.get("dir_fd"))
            reading = name == "open" and not (args[0] if args else kwargs["flags"]) & os.O_CREAT
            if path is None or reading or not path.is_relative_to(root):
                return real(target, *args, **kwargs)
            inside = True
            try:
                before(name)
                result = real(target, *args, **kwargs)
                after(name, path)
            finally:
                inside = False
            return result

        return call

    try:
        for name in STEPS:
            setattr(os, name, wrapped(name))
        yield
    finally:
        for name, real in _REAL.items():
            setattr(os, name, real)


def _path(target, dir_fd: int | None) -> Path | None:
    try:
        if isinstance(target, int):
            return Path(os.readlink(f"/proc/self/fd/{target}"))
        above = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) if dir_fd is not None else Path()
        return (above / os.fsdecode(target)).absolute()
    except OSError:
        return None
