"""Hub repos, against a local stand-in that speaks the Hub's HTTP: download, refuse, stop, go offline."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from model_hub import ModelHub, as_the_hub, wait_until

from comparator import sources
from comparator.core.errors import Stopped, UserError
from comparator.core.settings import Settings
from comparator.engine.worker import Worker
from comparator.sources import downloads, hub, hub_files, hub_login, isolated, open_checkpoint, search_hub

ROOT = Path(__file__).resolve().parents[2]
NAME = "someone/tiny-llama"


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub-model")
    tiny_models.save(folder, "llama", chat=True, dtype="bfloat16")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def server(tmp_path: Path, own_dirs: Path, monkeypatch, files):
    with as_the_hub(tmp_path / "hf", monkeypatch) as stand_in:
        stand_in.add(NAME, files, parameters=12345)
        yield stand_in


def unfinished(tmp_path: Path) -> list[str]:
    return [str(p) for p in (tmp_path / "hf").rglob("*") if p.name.endswith(".incomplete")]


def refused(name: str, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_checkpoint(name)
    for word in words:
        assert word.lower() in str(caught.value).lower(), f"“{word}” is missing from: {caught.value}"
    assert caught.value.advice
    return caught.value


# ---------------------------------------------------------------- what works


def test_a_repo_is_downloaded_with_progress_and_opened(server: ModelHub, tmp_path: Path) -> None:
    on_progress: list[tuple[float | None, str]] = []
    checkpoint = open_checkpoint(NAME, progress=lambda f, m: on_progress.append((f, m)))
    assert checkpoint.revision == server.repos[NAME].commit, "a branch must be resolved to its commit"
    assert checkpoint.source == NAME and checkpoint.dtype == "bf16" and checkpoint.has_chat_template
    assert checkpoint.note is None
    assert on_progress, "nothing was said meanwhile"
    assert (checkpoint.path / "tokenizer.json").is_file()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert tiny_models.unique_parameters(model) == checkpoint.parameters

    asked = len(server.requests)
    started_s = time.process_time()
    assert open_checkpoint(NAME) == checkpoint
    assert len(server.requests) == asked, "what is there was asked for again"
    assert time.process_time() - started_s < 0.5


def test_visitors_downloads_have_a_limit_and_the_operators_stay(server: ModelHub, files, monkeypatch) -> None:
    names = [f"someone/m{n}" for n in range(4)]
    for name in names:
        server.add(name, {**files, "model.safetensors": _safetensors(1_000_000)})
    open_checkpoint(names[0])  # the operator's, before the server is public
    one = sum(len(data) for data in files.values()) + 2_000_000
    monkeypatch.setattr(isolated, "open_first", lambda path, source, progress: None)
    settings = Settings(public=True, max_downloads=str(2 * one + 100_000))
    monkeypatch.setattr(isolated, "was_opened", lambda path: True)
    for module in (downloads, isolated, hub_login):
        monkeypatch.setattr(module, "get_settings", lambda: settings)
    here = lambda: [name for name in names if hub.in_cache(name, None)]  # noqa: E731
    open_checkpoint(names[1])
    open_checkpoint(names[2])
    assert here() == names[:3]
    open_checkpoint(names[1])  # used again, so that the other one is the oldest
    open_checkpoint(names[3])
    assert here() == [names[0], names[1], names[3]]
    assert sum(entry.bytes for _, entry in downloads._entries()) <= settings.max_downloads_bytes
    server.add("someone/huge", {**files, "model.safetensors": _safetensors(5_000_000)})
    with pytest.raises(UserError, match="COMPARATOR_MAX_DOWNLOADS"):
        open_checkpoint("someone/huge")
    assert here() == [names[0], names[1], names[3]], "room was made for what is refused"


def test_progress_is_in_bytes(server: ModelHub, files: dict[str, bytes]) -> None:
    server.add("someone/large", {**files, "model.safetensors": _safetensors(20_000_000)})
    server.chunk_s = 0.003  # a second and a half for 40 MB
    on_progress: list[tuple[float | None, str]] = []
    open_checkpoint("someone/large", progress=lambda f, m: on_progress.append((f, m)))
    fractions = [f for f, m in on_progress if f is not None and m.startswith("downloading")]
    assert len(set(fractions)) >= 3, f"progress does not move: {on_progress}"
    assert fractions == sorted(fractions) and 0 <= fractions[0] and fractions[-1] <= 1
    assert any("of 40.0 MB" in m for _, m in on_progress), on_progress[-3:]


def test_only_what_is_needed_is_downloaded(server: ModelHub, files: dict[str, bytes]) -> None:
    junk = {
        "pytorch_model.bin": b"x" * 1000, "pytorch_model.bin.index.json": b"{}", "model.fp32.safetensors": b"x" * 1000,
        "original/consolidated.00.pth": b"x" * 1000, "consolidated.safetensors": b"x" * 1000, "model.Q4_0.gguf": b"x" * 1000,
        "onnx/model.onnx": b"x" * 1000, "README.md": b"# x", "tf_model.h5": b"x" * 1000, "runs/a.json": b"{}",
    }  # fmt: skip
    server.add("someone/many", {**files, **junk})
    checkpoint = open_checkpoint("someone/many")
    asked = set(server.files_asked_for())
    assert asked == set(files), f"asked for too much: {asked - set(files)}, too little: {set(files) - asked}"
    assert sorted(p.name for p in checkpoint.path.iterdir()) == sorted(files)


def test_shards_and_a_missing_shard(server: ModelHub, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    model = tiny_models.save(folder, "llama", max_shard_size="20KB")
    server.add("someone/sharded", folder)
    assert open_checkpoint("someone/sharded").parameters == tiny_models.unique_parameters(model)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    server.add("someone/holes", folder)
    asked = len(server.files_asked_for())
    refused("someone/holes", shard.name)
    assert not [n for n in server.files_asked_for()[asked:] if n.endswith(".safetensors")], (
        "weights came for nothing"
    )


def test_autogptq_s_older_layout(server: ModelHub, files: dict[str, bytes]) -> None:
    legacy = {n: b for n, b in files.items() if n != "model.safetensors"}
    packed = {"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 64), np.int32)}
    legacy["gptq_model-4bit-128g.safetensors"] = safetensors.numpy.save(packed)
    legacy["quantize_config.json"] = b'{"bits": 4, "group_size": 128}'
    server.add("someone/legacy-GPTQ", legacy)
    checkpoint = open_checkpoint("someone/legacy-GPTQ")
    assert checkpoint.quantization == {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_revisions(server: ModelHub, files: dict[str, bytes]) -> None:
    repo = server.repos[NAME]
    repo.branches["v1.0"] = repo.commit
    checkpoint = open_checkpoint(f"{NAME}@v1.0")
    assert (checkpoint.source, checkpoint.revision) == (f"{NAME}@v1.0", repo.commit)
    asked = len(server.requests)
    by_commit = open_checkpoint(f"{NAME}@{repo.commit}")
    assert by_commit.path == checkpoint.path
    assert len(server.requests) == asked, "a commit never changes, so nothing has to be asked"
    refused(f"{NAME}@nowhere", "no revision", "nowhere")


def test_look_up_tells_without_the_weights(server: ModelHub) -> None:
    facts = sources.look_up(NAME)
    assert facts.architecture == "LlamaForCausalLM" and facts.parameters == 12345 and facts.dtype == "bf16"
    assert (
        facts.context_length == 128
        and facts.has_chat_template
        and facts.revision == server.repos[NAME].commit
    )
    assert not [n for n in server.files_asked_for() if n.endswith(".safetensors")]


def test_a_file_that_was_cut_off_in_the_cache_is_fetched_again(server: ModelHub) -> None:
    checkpoint = open_checkpoint(NAME)
    file = (checkpoint.path / "model.safetensors").resolve()
    file.write_bytes(file.read_bytes()[:100])
    assert open_checkpoint(NAME).tensors == checkpoint.tensors


# ---------------------------------------------------------------- without the Hub


def test_offline_a_name_fails_within_seconds(server: ModelHub, monkeypatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        started_s = time.monotonic()
        refused("someone/never-seen", "cannot be reached", "built-in model")
        assert time.monotonic() - started_s < 10
        started_s = time.monotonic()
        refused("someone/never-seen", "cannot be reached")
        assert time.monotonic() - started_s < 1, "the second question should not wait again"
        assert search_hub("tiny") == []


def test_a_hub_that_does_not_answer_fails_within_seconds(server: ModelHub) -> None:
    server.delay_s = 60
    started_s = time.monotonic()
    refused("someone/never-seen", "cannot be reached")
    assert time.monotonic() - started_s < 20
    started_s = time.monotonic()
    assert search_hub("tiny") == []
    assert time.monotonic() - started_s < 10


def test_a_name_server_that_does_not_answer_fails_within_seconds(server: ModelHub, monkeypatch) -> None:
    """getaddrinfo knows no timeout: only the deadline around it helps."""
    released = threading.Event()
    real = socket.getaddrinfo

    def slow(host, *args, **kwargs):
        if "hub.invalid" in str(host):
            released.wait(60)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    started_s = time.monotonic()
    refused("someone/never-seen", "cannot be reached")
    assert time.monotonic() - started_s < 20
    released.set()


def test_what_was_downloaded_serves_offline_and_says_so(server: ModelHub, monkeypatch) -> None:
    online = open_checkpoint(NAME)
    server.status = 503
    hub._listings.clear()
    offline = open_checkpoint(NAME)
    assert (offline.path, offline.revision, offline.tensors) == (online.path, online.revision, online.tensors)
    assert "could not be reached" in offline.note and online.revision[:7] in offline.note
    assert "could not be reached" in sources.look_up(NAME).note


def test_half_a_download_does_not_serve_offline(server: ModelHub) -> None:
    sources.look_up(NAME)  # config and tokenizer are there, the weights are not
    repo = server.repos[NAME]
    hub_files.remember_branch(
        hub_files._place() / "models--someone--tiny-llama" / "snapshots" / repo.commit, None, repo.commit
    )
    server.status = 503
    hub._listings.clear()
    refused(NAME, "incomplete", "http 503")


def test_offline_mode_is_named() -> None:
    code = (
        "from comparator.sources import open_checkpoint\n"
        "from comparator.types import UserError\n"
        "try:\n    open_checkpoint('someone/x')\nexcept UserError as p:\n    print(p)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "HF_HUB_OFFLINE" in said.stdout, said.stdout + said.stderr


# ---------------------------------------------------------------- what the Hub refuses


def test_not_found(server: ModelHub) -> None:
    problem = refused("someone/nothing", "no model someone/nothing")
    assert "HF_TOKEN" in problem.advice


def test_gated(server: ModelHub, files: dict[str, bytes], monkeypatch) -> None:
    server.add("someone/gated", files, gated=True)
    problem = refused("someone/gated", "gated", "https://huggingface.co/someone/gated", "HF_TOKEN")
    assert "No token is set" in problem.advice
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert open_checkpoint("someone/gated").parameters > 0


def test_private_and_a_wrong_token(server: ModelHub, files: dict[str, bytes], monkeypatch) -> None:
    server.add("someone/private", files, private=True)
    refused("someone/private", "can access")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    problem = refused("someone/private", "does not accept the token")
    assert "wrongwrong" not in str(problem), "a token reached a message"
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert open_checkpoint("someone/private").parameters > 0


def test_in_public_nobody_asks_the_hub_with_the_operators_token(
    server, files, monkeypatch, settings_env
) -> None:
    server.add("operator/private", files, private=True)
    server.add("operator/gated", files, gated=True)
    monkeypatch.setenv("HF_TOKEN", server.token)
    settings_env(public=1)
    refused("operator/private", "can access")
    refused("operator/gated", "gated")
    with pytest.raises(UserError):
        sources.look_up("operator/private")
    assert open_checkpoint(NAME).parameters > 0


def test_a_visitors_own_login_opens_what_that_account_may_have_and_nobody_else_gets_it(
    server, files, monkeypatch, settings_env
) -> None:
    for name in ("operator/gated", "maker/gated", "maker/private"):
        server.add(name, files, gated="gated" in name, private="private" in name)
    monkeypatch.setenv("HF_TOKEN", server.token)
    commit = open_checkpoint("operator/gated").revision  # in the cache, from before the server was public
    monkeypatch.setattr(isolated, "open_first", lambda path, source, progress: None)
    settings_env(public=1)
    worker = Worker()

    def opened(name: str) -> bool:
        return worker.call(lambda: open_checkpoint(name)).parameters > 0  # as the engine does it

    for name in ("maker/gated", "maker/private", "operator/gated", f"operator/gated@{commit}"):
        with hub_login.logged_in(server.token):
            assert opened(name)
        with pytest.raises(UserError, match="gated|can access") as problem:
            opened(name)  # it lies here now, and the next visitor has no login
        assert "your own machine" in problem.value.advice and "HF_TOKEN" not in problem.value.advice
        with hub_login.logged_in("hf_of_somebody_else"), pytest.raises(UserError, match="accept the token"):
            opened(name)
    settings_env(public=1, model="operator/gated")
    hub._listings.clear()
    assert opened("operator/gated"), "the operator serves this one"
    monkeypatch.setenv("SPACE_ID", "someone/space")
    monkeypatch.setenv("OAUTH_CLIENT_ID", "client")
    monkeypatch.setattr(hub_login, "find_spec", lambda name: object())
    refused("maker/gated", "button is at the top of the page")
    server.status = 500
    hub._listings.clear()
    refused("maker/private", "HTTP 500")


def test_a_name_that_is_looked_up_fetches_no_huge_config(server: ModelHub, files: dict[str, bytes]) -> None:
    server.add("someone/huge", files | {"config.json": b'{"a": "' + b"x" * 75_000_000 + b'"}'})
    with pytest.raises(UserError, match="config.json has 75 MB"):
        sources.look_up("someone/huge")
    assert server.served_bytes < 1e6, "a name that somebody typed makes this server download"
    refused("someone/huge", "config.json")


def test_slow_look_ups_leave_threads_for_others(server: ModelHub, monkeypatch) -> None:
    monkeypatch.setattr(hub, "_looking_up", threading.BoundedSemaphore(2))
    server.delay_s = 3.0
    threads = [threading.Thread(target=_look_up_quietly, args=(f"someone/slow{n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: hub._looking_up._value == 0)
    began = time.monotonic()
    with pytest.raises(UserError, match="other names are being looked up right now"):
        sources.look_up(NAME)
    assert time.monotonic() - began < 2.5
    for thread in threads:
        thread.join(30)
    server.delay_s = 0.0
    assert sources.look_up(NAME).parameters == 12345, "a look-up that failed keeps its place"


def _look_up_quietly(name: str) -> None:
    try:
        sources.look_up(name)
    except UserError:
        pass


@pytest.mark.parametrize(("status", "word"), [(500, "HTTP 500"), (429, "rate limit"), (403, "gated")])
def test_other_answers(server: ModelHub, status: int, word: str) -> None:
    server.status = status
    refused("someone/never-seen", word)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, ["pytorch_model.bin", "pickle"]),
        ({"model.safetensors": None}, ["no weights"]),
        ({"model.safetensors": None, "model.Q4_0.gguf": b"x"}, ["gguf"]),
        ({"config.json": None, "adapter_config.json": b"{}"}, ["adapter"]),
        ({"config.json": None}, ["no config.json"]),
        ({"tokenizer.json": None}, ["tokenizer"]),
        ({"config.json": b'{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'}, ["encoder-only"]),
        ({"config.json": b'{"model_type": "own", "architectures": ["Own"], "auto_map": {"a": "b"}}'}, ["trust_remote_code"]),
        ({"config.json": b"{"}, ["config.json"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_its_weights(
    server: ModelHub, files: dict[str, bytes], changes: dict, words: list[str]
) -> None:
    changed = {n: b for n, b in {**files, **changes}.items() if b is not None}
    server.add("someone/odd", changed)
    refused("someone/odd", *words)
    heavy = [n for n in server.files_asked_for() if n.endswith((".safetensors", ".bin", ".gguf"))]
    assert not heavy, f"downloaded for nothing: {heavy}"


def test_weights_that_arrive_damaged_are_named(server: ModelHub, files: dict[str, bytes]) -> None:
    server.add("someone/damaged", {**files, "model.safetensors": b"\x08\0\0\0\0\0\0\0notjson!"})
    refused("someone/damaged", "model.safetensors", "damaged")


# ---------------------------------------------------------------- Stop, and a full disk


def test_stop_is_honoured_while_downloading(
    server: ModelHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.add("someone/large", {**files, "model.safetensors": _safetensors(20_000_000)})
    server.chunk_s = 0.02  # 40 MB would take 12 s
    stopped_s = 0.0

    def progress(fraction: float | None, message: str) -> None:
        nonlocal stopped_s
        if message.startswith("downloading"):
            stopped_s = time.monotonic()
            raise Stopped

    with pytest.raises(Stopped):
        open_checkpoint("someone/large", progress=progress)
    assert time.monotonic() - stopped_s < 5
    # The thread ends at the next piece and clears its file away.
    assert wait_until(lambda: not unfinished(tmp_path), 10), unfinished(tmp_path)
    assert server.served_bytes < 30_000_000, "the download went on after Stop"
    server.chunk_s = 0
    assert open_checkpoint("someone/large").parameters == 20_000_000


def test_stop_is_honoured_while_the_hub_is_silent(server: ModelHub) -> None:
    server.delay_s = 60
    calls = 0

    def progress(fraction: float | None, message: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped

    started_s = time.monotonic()
    with pytest.raises(Stopped):
        open_checkpoint("someone/never-seen", progress=progress)
    assert time.monotonic() - started_s < 15


def test_too_little_space_is_told_before_downloading(server: ModelHub, monkeypatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_files.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    refused(NAME, "MB free", "HF_HOME")
    assert server.files_asked_for() == []


def test_a_disk_that_fills_up(server: ModelHub, files: dict[str, bytes], tmp_path: Path) -> None:
    """A limit on the size of files makes a real error of writing."""
    import resource
    import signal

    server.add("someone/large", {**files, "model.safetensors": _safetensors(1_000_000)})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        refused("someone/large", "disk filled up", "HF_HOME")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert unfinished(tmp_path) == []


# ---------------------------------------------------------------- search


def test_search(server: ModelHub) -> None:
    server.add("someone/other", {})
    assert search_hub("tiny") == [NAME]
    asked = len(server.requests)
    assert search_hub("TINY ") == [NAME]
    assert len(server.requests) == asked, "the same search was asked twice"
    assert search_hub("someone", limit=1) == [NAME]
    for query in ("", "x", "a\nb", "ü", "{}", "a" * 3 + "?"):
        assert search_hub(query) == []
    server.status = 500
    assert search_hub("other") == []


def _safetensors(values: int) -> bytes:
    """One bf16 tensor under the name of an embedding."""
    import struct

    header = {
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(2 * values)
