"""A Hub model's headers without its weights, against a local stand-in that speaks the Hub's HTTP."""

from __future__ import annotations

import json

import pytest
import tiny_models
from model_hub import model_hub

from comparator.core.errors import UserError
from comparator.sources import hub, hub_headers, open_checkpoint, open_headers

NAME = "someone/tiny-llama"


@pytest.fixture
def served(tmp_path, own_dirs, monkeypatch):
    """(server, folder of the model that it serves as NAME), in several files."""
    folder = tmp_path / "model"
    tiny_models.save(
        folder, "llama", dtype="bfloat16", hidden_size=256, vocab_size=4096, max_shard_size="1500KB"
    )
    with model_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for known in (hub._listings, hub_headers._known):
            known.clear()
        server.add(NAME, folder)
        yield server, folder
    hub._listings.clear()
    hub_headers._known.clear()


def test_headers_tell_what_the_files_tell(served):
    server, folder = served
    remote, local = open_headers(NAME), open_checkpoint(str(folder))
    weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert server.served_bytes < weights / 4, "more than the headers of its weight files was asked for"
    assert set(remote.tensors) == set(local.tensors)
    for name in ("architecture", "parameters", "dtype", "context_length", "vocab_size", "tied", "model_type"):
        assert getattr(remote, name) == getattr(local, name), name
    assert remote.source == NAME and "not downloaded" in remote.note
    asked = len(server.requests)
    assert open_headers(NAME) is remote and len(server.requests) == asked, "headers are read anew each time"


@pytest.mark.parametrize(
    "change", ({"shape": [2**50, 2]}, {"shape": [-1, 4]}, {"dtype": "Q4"}, {"shape": [10**9, 64]})
)
def test_a_header_that_lies_is_refused_by_name(served, change):
    server, folder = served
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    name = next(n for n in files if n.endswith(".safetensors"))
    length = int.from_bytes(files[name][:8], "little")
    header = json.loads(files[name][8 : 8 + length])
    next(v for k, v in header.items() if k != "__metadata__").update(change)
    text = json.dumps(header).encode()
    files[name] = len(text).to_bytes(8, "little") + text + files[name][8 + length :]
    server.add(NAME, files)
    with pytest.raises(UserError, match=name):
        open_headers(NAME)
