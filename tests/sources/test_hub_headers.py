"""A Hub model's headers without its weights, against a local stand-in that speaks the Hub's HTTP."""

from __future__ import annotations

import json
import resource

import pytest
import tiny_models
from model_hub import as_the_hub

from comparator.core.errors import UserError
from comparator.sources import folder as folder_module
from comparator.sources import hub, isolated, open_checkpoint, open_headers

NAME = "someone/tiny-llama"


@pytest.fixture
def served(tmp_path, own_dirs, monkeypatch):
    """(server, folder of the model that it serves as NAME), in several files."""
    folder = tmp_path / "model"
    tiny_models.save(
        folder, "llama", dtype="bfloat16", hidden_size=256, vocab_size=4096, max_shard_size="1500KB"
    )
    with as_the_hub(tmp_path / "hf", monkeypatch) as server:
        server.add(NAME, folder)
        yield server, folder


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
    "change",
    (
        {"shape": [2**50, 2]}, {"shape": [-1, 4]}, {"dtype": "Q4"}, {"dtype": ["F32"]}, {"shape": [10**9, 64]},
        {"shape": None}, {"shape": [10**4000] * 500},  # whose product takes every thread for minutes
    ),
)  # fmt: skip
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


def test_a_header_of_any_size_is_refused_unread(served):
    server, folder = served
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    name = next(n for n in files if n.endswith(".safetensors"))
    files[name] = (2**40).to_bytes(8, "little") + files[name][8:]
    server.add(NAME, files)
    with pytest.raises(UserError, match=f"{name}.*at most 16 MB are read"):
        open_headers(NAME)
    assert server.served_bytes < 1e6


def test_on_a_public_server_a_download_is_opened_in_another_process_first(served, monkeypatch):
    monkeypatch.setenv("COMPARATOR_PUBLIC", "1")
    opened, inspect = [], folder_module.inspect
    monkeypatch.setattr(isolated, "open_first", lambda path, source, progress: opened.append(path))

    def inspected(path, source, **about):
        assert path in opened, "this process reads a stranger's files before they were tried elsewhere"
        return inspect(path, source, **about)

    monkeypatch.setattr(folder_module, "inspect", inspected)
    path = hub.open_repo(NAME, None, lambda fraction, message: None).path
    assert opened == [path]
    assert hub.in_cache(NAME, None) is None, "it is opened without having been tried"
    mark = isolated._mark(path)
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert hub.in_cache(NAME, None).path == path


def test_a_config_that_is_a_list_of_billions_is_read_elsewhere(served, tmp_path, settings_env):
    """GPT-Neo's config writes out "n times global": 24 GB for three billion, before a weight is asked for."""
    server, _ = served
    folder = tmp_path / "neo"
    config = {
        "vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global"], 2]],
    }  # fmt: skip
    tiny_models.save_config(folder, "gpt_neo", config)
    server.add("someone/neo", folder)
    settings_env(public=1)
    try:
        assert open_headers("someone/neo").architecture == "GPTNeoForCausalLM"
        written = json.loads((folder / "config.json").read_text()) | {
            "attention_types": [[["global"], 10**8]]
        }
        (folder / "config.json").write_text(json.dumps(written))
        server.add("someone/bomb", folder)
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match="someone/bomb takes"):
            open_headers("someone/bomb")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 300_000
    finally:
        isolated.beside.close()
