"""Adapters from the Hub, against a local stand-in that speaks its HTTP: revisions, pickles, offline, Stop."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path

import pytest
from model_hub import ModelHub, as_the_hub, wait_until

from comparator import adapters
from comparator.adapters.locate import builtin_path
from comparator.core.errors import Stopped, UserError
from comparator.core.variant import parse_adapter
from comparator.sources import hub, isolated

NAME = "someone/pirate-lora"


@pytest.fixture
def server(tmp_path: Path, own_dirs: Path, monkeypatch):
    with as_the_hub(tmp_path / "hf", monkeypatch) as stand_in:
        stand_in.add(NAME, files(), parameters=None)
        yield stand_in


def files(**more: bytes) -> dict[str, bytes]:
    read = {p.name: p.read_bytes() for p in builtin_path("pirate").iterdir()}
    # What training leaves beside an adapter; none of it is needed, and the last two are pickles.
    return read | {"README.md": b"hello", "optimizer.pt": b"x" * 1000, "training_args.bin": b"x" * 100} | more


def opened(text: str, progress=None):
    return adapters.describe(adapters.open_adapter(parse_adapter(text), progress=progress))


def test_an_adapter_is_downloaded_and_described(server: ModelHub):
    facts = opened(NAME)
    assert facts.kind == "LoRA" and facts.parameters == 737_280
    assert facts.revision == server.repos[NAME].commit, "a branch must be resolved to its commit"
    assert facts.source == NAME
    fetched = {path for _, path in server.requests if "/resolve/" in path}
    assert not any("optimizer" in p or "training_args" in p or "README" in p for p in fetched), fetched


def test_a_revision_is_asked_for_by_name(server: ModelHub):
    server.repos[NAME].branches["v1"] = server.repos[NAME].commit
    assert opened(f"{NAME}@v1*0.5").revision == server.repos[NAME].commit
    with pytest.raises(UserError, match="v2"):
        opened(f"{NAME}@v2")


def test_a_pickle_is_refused_before_it_is_downloaded(server: ModelHub):
    pickled = files()
    pickled["adapter_model.bin"] = pickled.pop("adapter_model.safetensors")
    server.add("someone/pickled", pickled, parameters=None)
    with pytest.raises(UserError, match="adapter_model.bin"):
        opened("someone/pickled")
    assert not any("/resolve/" in path for _, path in server.requests)


def test_a_repo_without_an_adapter_is_refused_by_what_it_is(server: ModelHub):
    server.add("someone/model", {"config.json": b"{}", "model.safetensors": b""}, parameters=None)
    with pytest.raises(UserError, match="whole model"):
        opened("someone/model")
    with pytest.raises(UserError, match="someone/nothing"):
        opened("someone/nothing")


def test_what_was_downloaded_serves_offline(server: ModelHub, monkeypatch):
    commit = opened(NAME).revision
    hub._listings.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    again = opened(NAME)
    assert again.revision == commit and again.parameters == 737_280
    with pytest.raises(UserError, match="cannot be reached"):
        opened("someone/never-seen")


def test_stop_ends_a_download(server: ModelHub):
    server.chunk_s, before = 0.2, set(threading.enumerate())  # other tests' pools may be there still

    def downloading() -> list[str]:
        started = [t.name for t in threading.enumerate() if t not in before]
        return [name for name in started if name.startswith(("hub", "ThreadPoolExecutor"))]

    def stop(fraction, message):
        if message.startswith("downloading"):
            raise Stopped

    with pytest.raises(Stopped):
        opened(NAME, progress=stop)
    server.chunk_s = 0
    assert wait_until(lambda: not downloading()), "a thread downloads on after Stop"


def test_a_config_of_any_size_is_neither_downloaded_nor_read(server: ModelHub, tmp_path: Path):
    huge = b'{"peft_type": "LORA", "x": "' + b"x" * 5_000_000 + b'"}'
    server.add("someone/huge", files() | {"adapter_config.json": huge})
    with pytest.raises(UserError, match="adapter_config.json of someone/huge has 5 MB"):
        opened("someone/huge")
    assert server.served_bytes < 1e6
    for name, data in (files() | {"adapter_config.json": huge}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        opened(str(tmp_path))


@pytest.fixture
def public(server: ModelHub, settings_env):
    """A public server; its processes for strangers' files end with the test."""
    settings_env(public=1)
    yield server
    isolated.beside.close()


def spent(text: str, match: str) -> None:
    """The adapter is refused, and this process computes next to nothing for it."""
    isolated.beside.close()
    began_s, peak_kb = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=match):
        opened(text)
    assert time.process_time() - began_s < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 200_000


def test_on_a_public_server_a_strangers_adapter_is_opened_elsewhere_first(public: ModelHub):
    messages = []
    facts = opened(NAME, progress=lambda fraction, message: messages.append(message))
    assert facts.parameters == 737_280 and isolated.beside.child is not None
    assert any("in a separate process" in m for m in messages)
    isolated.beside.close()
    opened(NAME)
    opened("pirate")
    assert isolated.beside.child is None, "it was opened a second time, or the built-in one was"


def test_a_config_of_nested_lists_is_refused(public: ModelHub):
    nested = b'{"peft_type": "LORA", "r": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    public.add("someone/nested", files() | {"adapter_config.json": nested}, parameters=None)
    spent("someone/nested", "adapter_config.json of someone/nested cannot be read")


def test_a_header_larger_than_any_adapters_is_refused(public: ModelHub):
    header = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' + b" " * 30_000_000 + b"}"
    data = len(header).to_bytes(8, "little") + header
    public.add("someone/header", files() | {"adapter_model.safetensors": data}, parameters=None)
    spent("someone/header", "header has 30 MB")


def test_names_times_modules_end_at_the_limit_of_computing(public: ModelHub, monkeypatch):
    """Each list alone is within its limit; holding one against the other would take hours."""
    tensors = {
        f"base_model.model.m{i}.lora_A.weight": {"dtype": "F32", "shape": [8, 0], "data_offsets": [0, 0]}
        for i in range(40_000)
    }
    header = json.dumps(tensors).encode()
    config = {"peft_type": "LORA", "r": 8, "target_modules": [f"n{i}" for i in range(200_000)]}
    attack = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": len(header).to_bytes(8, "little") + header,
    }
    public.add("someone/product", files() | attack, parameters=None)
    monkeypatch.setattr(isolated, "OPEN_CPU_S", 2)
    spent("someone/product", "someone/product takes longer than 2 s of computing")
