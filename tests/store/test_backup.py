"""A backup comes back whole on an empty disk, and what somebody else made of one does no harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comparator.adapters.locate import builtin_path, trained_names
from comparator.cli import app
from comparator.cli.backup import _kinds
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import CellResult, PromptInfo
from comparator.core.settings import Settings, get_settings
from comparator.store import backup, links, open_store
from comparator.store.files import MAX_SIDECAR_BYTES
from tests.sample import comparison

MANIFEST = (backup.MANIFEST, json.dumps({"format": 1}).encode())


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(data_dir=tmp_path / "data", public=False)


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def asked(prompt: str, id: str = "comparison"):
    return comparison(id=id, prompt=PromptInfo(prompt), cells=(CellResult("bf16", text="An answer."),))


def adapter(data_dir: Path, name: str = "mine") -> Path:
    """A trained adapter's folder with real weights."""
    folder, pirate = data_dir / "adapters" / name, builtin_path("pirate")
    folder.mkdir(parents=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / file).write_bytes((pirate / file).read_bytes())
    (folder / "held_back.jsonl").write_text('{"row": 1, "ids": [1], "labels": [1]}\n')
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    return folder


def archive(path: Path, *members: tuple, compress: int = 6) -> Path:
    """A tar.gz of (name or TarInfo, bytes)."""
    with (
        gzip.open(path, "wb", compresslevel=compress) as packed,
        tarfile.open(fileobj=packed, mode="w:") as tar,
    ):
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def written(id: str, prompt: str = "Hello") -> tuple[str, bytes]:
    return f"comparisons/{id}.json", document.dumps(asked(prompt, id)).encode()


def everything(folder: Path) -> set[str]:
    """What a restore could have made, below the folder that holds the data folder too."""
    made = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
    return {p for p in made if "index-" not in p and not p.endswith(".tar.gz")}


# ---------------------------------------------------------------- there and back


def test_a_backup_comes_back_on_an_empty_disk(own_dirs):
    data, file, other = own_dirs / "data", own_dirs / "all.tar.gz", own_dirs / "new" / "disk"
    with open_store() as saved:
        paris = saved.save(asked("What is the capital of France?"), "me", name="Paris")
        deleted = saved.save(asked("Delete me"), "me")
        saved.delete(deleted)
        original, entries = saved.load(paris), (saved.entry(paris), saved.entry(deleted))
    adapter(data)
    run = data / "trainings" / "cut-off"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "samples.jsonl").write_text("[]\n")
    (run / "checkpoint-5" / "optimizer.pt").write_bytes(b"a pickle")
    made = command("backup", file)
    assert made.exit_code == 0 and "2 comparisons, 1 adapter and 1 training record" in made.output
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "it holds people's prompts"
    with tarfile.open(file) as tar:
        names = tar.getnames()
    assert not [n for n in names if "index" in n or "checkpoint" in n or n.endswith(".pt")]

    back = command("restore", file, "--into", other)
    assert back.exit_code == 0 and "2 comparisons, 1 adapter and 1 training record" in back.output
    moved = Settings(data_dir=other, public=True)
    with open_store(moved) as saved:
        assert saved.load(paris) == original
        assert (saved.entry(paris), saved.entry(deleted)) == entries
        assert [e.id for e in saved.search("france", "me")] == [paris], "the history does not know it"
        assert [e.id for e in saved.search(owner="me", deleted=True)] == [deleted]
        saved.undelete(deleted, "me")  # still its owner's
    assert trained_names(moved) == ["mine"]
    for path in (
        "adapters/mine/adapter_model.safetensors",
        "adapters/mine/held_back.jsonl",
        "trainings/cut-off/run.json",
    ):
        assert (other / path).read_bytes() == (data / path).read_bytes()
    for path in [other, *other.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if "index-" not in path.name:
            assert mode == (0o700 if path.is_dir() else 0o600), f"{path.name} has mode {mode:o}"
    assert not list((other / "tmp").iterdir())


def test_nothing_is_overwritten(own_dirs):
    file = own_dirs / "all.tar.gz"
    with open_store() as saved:
        id = saved.save(asked("Hello"), name="Then")
    weights = adapter(own_dirs / "data") / "adapter_model.safetensors"
    assert command("backup", file).exit_code == 0
    with open_store() as saved:
        saved.rename(id, "Now")
    weights.write_bytes(b"trained further")
    back = command("restore", file)
    assert (
        back.exit_code == 0
        and "0 comparisons, 0 adapters" in back.output
        and "because they already exist: 2" in back.output
    )
    with open_store() as saved:
        assert saved.entry(id).name == "Now"
    assert weights.read_bytes() == b"trained further"
    again = command("backup", file)
    assert isinstance(again.exception, UserError) and "already exists" in again.exception.problem


def test_what_was_purged_comes_back_from_a_backup_only(own_dirs):
    file = own_dirs / "all.tar.gz"
    with open_store() as saved:
        id = saved.save(asked("Hello"))
    command("backup", file)
    with open_store() as saved:
        saved.purge(id, lambda sidecar: True)
        assert saved.count() == 0
    assert command("restore", file).exit_code == 0
    with open_store() as saved:
        assert [e.id for e in saved.search()] == [id] and saved.load(id).id == id


# ---------------------------------------------------------------- what others made of it

ID = "A" * 22


@pytest.mark.parametrize(
    "bad",
    [
        ("../outside.json", b"{}"), ("/tmp/outside.json", b"{}"), ("comparisons/../../outside.json", b"{}"),
        ("comparisons/x.json", b"{}"), (f"comparisons/{ID}.json/../../x", b"{}"), (f"./comparisons/{ID}.json", b"{}"),
        (f"comparisons\\{ID}.json", b"{}"), ("index-1-a.sqlite3", b"x"), ("adapters/../x/adapter_config.json", b"{}"),
        ("adapters/.hidden/adapter_config.json", b"{}"), ("adapters/a/adapter_model.bin", b"pickle"),
        ("adapters/a/b/adapter_config.json", b"{}"), ("trainings/a/checkpoint-5/optimizer.pt", b"pickle"),
        ("adapters/" + "a" * 65 + "/adapter_config.json", b"{}"), ("adapters/é/adapter_config.json", b"{}"),
        (member(f"comparisons/{ID}.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
        (member(f"comparisons/{ID}.json", type=tarfile.LNKTYPE, linkname="../outside"), b""),
        (member(f"comparisons/{ID}.json", type=tarfile.FIFOTYPE), b""),
        (member(f"comparisons/{ID}.json", type=tarfile.CHRTYPE, devmajor=1, devminor=5), b""),
        (member(f"comparisons/{ID}.json", type=tarfile.BLKTYPE, devmajor=8), b""),
        (member("adapters", type=tarfile.SYMTYPE, linkname="/tmp"), b""),
        (member("comparisons", type=tarfile.DIRTYPE), b""),
        (f"comparisons/{ID}.meta.json", b" " * (MAX_SIDECAR_BYTES + 1)),
        ("adapters/a/adapter_config.json", b" " * 16_000_001),
    ],
    ids=lambda bad: str(getattr(bad[0], "name", bad[0]))[:40],
)  # fmt: skip
def test_a_member_that_no_backup_has_refuses_the_archive_before_anything_is_written(settings, tmp_path, bad):
    file = archive(tmp_path / "bad.tar.gz", MANIFEST, written(links.new_id()), bad)
    with open_store(settings) as saved:
        before = everything(tmp_path)
        with pytest.raises(UserError, match="nothing was restored") as refused:
            backup.restore(saved, _kinds(), file)
        assert refused.value.advice and everything(tmp_path) == before and saved.count() == 0


def _pax(name: str, size: int) -> bytes:
    return member(name, type=tarfile.XHDTYPE, size=size).tobuf(tarfile.USTAR_FORMAT)


def _raw(path: Path, *parts: bytes) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as packed:
        info = member(MANIFEST[0], size=len(MANIFEST[1]))
        packed.write(info.tobuf(tarfile.USTAR_FORMAT) + MANIFEST[1].ljust(512, b"\0"))
        for part in parts:
            packed.write(part)
    return path


def _negative() -> bytes:
    header = bytearray(member(f"comparisons/{ID}.json").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # −256 in base 256
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    return bytes(header)


BOMBS = {
    "a header as long as it likes": lambda p: _raw(p, _pax("x", 200_000_000), b"\0" * 200_000_000),
    "headers without end": lambda p: _raw(p, *[_pax("x", 512) + b"\0" * 512] * 30_000),
    "a long name": lambda p: _raw(p, member("x", type=tarfile.GNUTYPE_LONGNAME, size=10**8).tobuf(), b"a" * 10**8),
    "a negative size": lambda p: _raw(p, _negative() * 50),
    "a size that cannot be": lambda p: _raw(p, member("adapters/a/adapter_model.safetensors", size=2**40).tobuf(tarfile.GNU_FORMAT)),
    "200 MB of blanks": lambda p: archive(p, MANIFEST, ("adapters/a/adapter_model.safetensors", b" " * 200_000_000), compress=9),
    "not gzip": lambda p: p.write_bytes(os.urandom(100_000)) and p,
    "cut off": lambda p: p.write_bytes(archive(p, MANIFEST, written(links.new_id())).read_bytes()[:-300]) and p,
    "gzip of noise": lambda p: p.write_bytes(gzip.compress(os.urandom(100_000))) and p,
    "no manifest": lambda p: archive(p, written(links.new_id())),
    "a later format": lambda p: archive(p, (MANIFEST[0], b'{"format": 2}')),
    "a manifest of brackets": lambda p: archive(p, (MANIFEST[0], b"[" * 60_000)),
    "empty": lambda p: archive(p),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_is_no_backup_is_refused_in_bounded_time_and_memory(settings, tmp_path, name):
    file = BOMBS[name](tmp_path / "bomb.tar.gz")
    with open_store(settings) as saved:
        kinds, before = _kinds(), everything(tmp_path)
        tracemalloc.start()
        began = time.process_time()
        try:
            with pytest.raises(UserError) as refused:
                backup.restore(saved, kinds, file)
            took_s, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert refused.value.advice
        assert took_s < 5, f"{took_s:.1f} s"
        assert peak < 40e6, f"{peak / 1e6:.0f} MB"
        assert everything(tmp_path) == before and saved.count() == 0


def test_one_bad_document_does_not_keep_the_others_out(own_dirs):
    good, wrong, huge, other = (links.new_id() for _ in range(4))
    deep = b"[" * 5_000_000
    file = archive(
        own_dirs / "mixed.tar.gz", MANIFEST,
        (f"comparisons/{wrong}.json", b'{"schema": 1}'), (f"comparisons/{huge}.json", deep),
        (f"comparisons/{other}.json", written(good)[1]),  # a document under another's id
        (f"comparisons/{good}.meta.json", b'{"owner": 5}'), written(good),
        ("adapters/noise/adapter_model.safetensors", os.urandom(4000)), ("adapters/noise/adapter_config.json", b"{}"),
        ("trainings/run/run.json", b"{"),
    )  # fmt: skip
    began = time.process_time()
    done = command("restore", file)
    assert time.process_time() - began < 10 and done.exit_code == 1
    assert done.output.count("Not restored") == 6, (
        done.output
    )  # a damaged sidecar too: nobody's is not somebody's
    assert good in done.output and not (own_dirs / "data" / "adapters" / "noise").exists()
    file = archive(own_dirs / "good.tar.gz", MANIFEST, written(good))
    assert command("restore", file).exit_code == 0
    with open_store() as saved:
        assert [e.id for e in saved.search()] == [good]


def test_a_document_larger_than_imports_may_be_is_named(own_dirs, settings_env):
    settings_env(data_dir=own_dirs / "data", max_upload="1kB")
    id = links.new_id()
    file = archive(own_dirs / "large.tar.gz", MANIFEST, written(id, "x" * 2000))
    refused = command("restore", file)
    assert refused.exit_code == 1 and "COMPARATOR_MAX_UPLOAD" in refused.output
    assert get_settings().max_upload_bytes == 1000
