"""A server with OpenAI's API as a column (tests/openai_server.py): what it is asked, what is measured, what goes wrong."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from openai_server import OpenAIServer, script

from comparator.backends import resolve
from comparator.backends.base import Placement
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest
from comparator.core.request import GenerationSettings
from comparator.decoding.text import encode
from comparator.runtimes import runtime_for
from comparator.sources import open_checkpoint

TEXT = " Paris. The capital of France"
SECRET = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(checkpoint, tokenizer, prompt, ids of TEXT) of a tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_models.save(folder, chat=True)
    checkpoint, tokenizer = open_checkpoint(str(folder)), tiny_models.tokenizer(chat=True)
    prompt = encode(tokenizer, "What is the capital?", "Be brief.", None)
    return SimpleNamespace(
        checkpoint=checkpoint, tokenizer=tokenizer, prompt=prompt, ids=tokenizer(TEXT)["input_ids"]
    )


@pytest.fixture
def serve(model, settings_env):
    """`serve(forms=…)` starts a server that says TEXT, listed as endpoint@tiny; `column()` makes it resident."""
    started, loaded = [], []

    def start(**how) -> OpenAIServer:
        says = how.pop("says", script(model.ids, tiny_models.VOCABULARY, model.tokenizer.eos_token_id))
        server = OpenAIServer(model.tokenizer, says, **how).__enter__()
        settings_env(endpoints=f"tiny={server.url}")
        started.append(server)
        return server

    yield start
    for slot in loaded:
        slot.unload()
    for server in started:
        server.__exit__()


def load(model, notation: str = "endpoint@tiny", progress=lambda *_: None):
    variant = resolve(notation)
    return runtime_for(variant).load(model.checkpoint, variant, Placement(), progress)


def generate(column, model, cancel=None, emit=lambda token: None, **settings):
    settings = GenerationSettings(**{"max_new_tokens": 40, **settings})
    return column.generate(model.prompt, settings, cancel or threading.Event(), emit)


# ---------------------------------------------------------------- what it is asked


@pytest.mark.parametrize(
    ("how", "path", "word"),
    [
        ({}, "/v1/completions", "token ids"),
        ({"forms": ("text", "chat")}, "/v1/completions", "rendered text"),
        ({"forms": ("chat",)}, "/v1/chat/completions", "messages"),
        ({"forms": ("text", "chat"), "template_tokens": 9}, "/v1/chat/completions", "messages"),
        ({"forms": ("text",), "fields": ()}, "/v1/completions", "rendered text"),
    ],
    ids=["ids", "text", "chat", "text is put into a template once more", "no fields beyond OpenAI's"],
)
def test_the_best_form_that_a_server_understands_is_used(serve, model, how, path, word):
    server = serve(**how)
    column = load(model)
    run = generate(column, model)
    asked, headers, body = server.requests[-1]
    assert (asked, run.decode_path) == (path, f"server, {word}"), "the wrong form was found to be understood"
    sent = {
        "token ids": list(model.prompt.token_ids),
        "rendered text": model.prompt.text,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the capital?"},
        ],
    }[word]
    assert body.get("prompt", body.get("messages")) == sent, "not the prompt of the other columns"
    assert body["temperature"] == 0 and body["max_tokens"] == 40 and "authorization" not in headers
    assert body.get("top_k") == (-1 if "fields" not in how else None), (
        "a field was sent that this server refuses"
    )
    said = {
        "token ids": "like every other variant",
        "rendered text": "as text",
        "messages": "its own chat template",
    }
    assert any(said[word] in note for note in column.notes), "the column does not say what the server got"
    assert (run.text, run.finish_reason) == (TEXT, "eos")
    column.unload()


def test_token_ids_are_the_servers_own_where_it_gives_them(serve, model):
    apart = [i for letter in " Paris" for i in model.tokenizer(letter)["input_ids"]]
    assert apart != model.tokenizer(" Paris")["input_ids"], "this text has to be cut in two ways"
    says = script(apart, tiny_models.VOCABULARY, model.tokenizer.eos_token_id)
    server = serve(says=says, gives_ids=True)
    column, seen = load(model), []
    run = generate(column, model, emit=seen.append)
    end = model.tokenizer.eos_token_id
    assert list(run.token_ids) == [*apart, end] == [token for token, _ in seen]
    server.gives_ids = False
    run = generate(column, model)
    assert run.text == " Paris" and list(run.token_ids) == [*model.tokenizer(" Paris")["input_ids"], end]
    assert any("returns no token ids" in note for note in run.notes)
    column.unload()


def test_times_are_those_of_the_client(serve, model):
    server = serve(gives_ids=True)
    column = load(model)
    server.token_s = 0.02
    run = generate(column, model, max_new_tokens=5)
    assert run.finish_reason == "length" and len(run.token_ids) == 5
    figures = run.latency
    assert figures.ttft_s >= 0.02 and figures.itl_p50_s >= 0.015, "faster than the server sends"
    assert 0 < figures.round_trip_s < figures.ttft_s, "the round trip was not measured apart"
    assert run.run_peak_bytes is None and column.memory.resident_bytes is None and column.held_bytes == 0
    column.unload()


def test_sampling_is_the_servers_and_says_so(serve, model):
    server = serve()
    column = load(model)
    run = generate(column, model, temperature=0.7, top_p=0.9, top_k=40, seed=3)
    body = server.requests[-1][2]
    assert (body["temperature"], body["top_p"], body["top_k"], body["seed"]) == (0.7, 0.9, 40, 3)
    assert any("own random numbers" in note for note in run.notes)
    server.fields = ()
    column.unload()
    column = load(model)
    with pytest.raises(UserError, match="neither top-k"):
        generate(column, model, temperature=0.7, top_k=40)
    column.unload()


def test_what_the_server_is_stands_in_the_column(serve, model):
    serve(owned_by="vllm", models=("org/tiny-AWQ",))
    column = load(model)
    loaded = column.describe(fresh=True)
    assert loaded.kernel == "vLLM" and any("org/tiny-AWQ" in note for note in loaded.notes)
    assert loaded.environment.device == "vLLM at endpoint@tiny", (
        "its speed would be compared as if it ran here"
    )
    column.unload()


def test_the_model_has_to_be_named_where_there_are_several(serve, model, settings_env):
    server = serve(models=("one", "two"))
    with pytest.raises(UserError, match=r"2 models.*#.*one, two"):
        load(model)
    settings_env(endpoints=f"tiny={server.url}#two")
    column = load(model)
    assert server.requests[-1][2]["model"] == "two"
    column.unload()
    server.models_broken = True
    column = load(model)
    assert server.requests[-1][2]["model"] == "two" and column.is_current(), "a named model needs no list"
    column.unload()
    settings_env(endpoints=f"tiny={server.url}#three")
    with pytest.raises(UserError, match="no such model or path.*three"):
        load(model)


# ---------------------------------------------------------------- keys


def test_only_a_listed_server_gets_a_key_and_only_its_own(serve, model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + "-of-openai")
    monkeypatch.setenv("OPENAI_ORG_ID", SECRET + "-org")
    monkeypatch.setenv("COMPARATOR_ENDPOINT_KEY_TINY", SECRET)
    server = serve()
    for notation, expected in (("endpoint@tiny", f"Bearer {SECRET}"), (f"endpoint@{server.url}", None)):
        column = load(model, notation)
        generate(column, model)
        column.unload()
        headers = {name.lower(): value for name, value in server.requests[-1][1].items()}
        assert headers.get("authorization") == expected, f"{notation} got the wrong key"
        assert not [v for v in headers.values() if SECRET in v and v != expected], "another key was sent"


# ---------------------------------------------------------------- Stop


def test_stop_ends_it_within_a_token_and_the_server_too(serve, model):
    server = serve(says=lambda ids, step: np.eye(tiny_models.VOCABULARY, dtype=np.float32)[40])
    column, stop, tokens = load(model), threading.Event(), []
    server.token_s = 0.02

    def emit(token):
        tokens.append(token)
        if len(tokens) == 3:
            stop.set()

    run = generate(column, model, stop, emit, max_new_tokens=1000)
    assert run.finish_reason == "stopped" and len(run.token_ids) <= 4
    assert server.hung_up.wait(5), "the server goes on computing for nobody"
    column.unload()


def test_stop_is_heard_while_the_server_is_silent(serve, model):
    server = serve()
    column, stop = load(model), threading.Event()
    server.fault = "slow"
    threading.Timer(0.1, stop.set).start()
    start_s = time.monotonic()
    run = generate(column, model, stop)
    assert (run.finish_reason, run.token_ids) == ("stopped", ()) and time.monotonic() - start_s < 10
    column.unload()

    def progress(*_):
        raise Stopped

    with pytest.raises(Stopped):
        load(model, progress=progress)


# ---------------------------------------------------------------- what goes wrong

FAULTS = {
    "slow": "sent nothing for",
    "cut": "in the middle of its answer",
    "unfinished": "in the middle of its answer",
    "json": "not OpenAI's API",
    "page": "not OpenAI's API",
    "line": "line of more than 1 MB",
    "error": "the engine is dead",
    "redirect": "redirects",
    "401": "refused access",
    "403": "refused access",
    "404": "no such model or path",
    "429": "no more requests now",
    "500": "failed (HTTP 500)",
    "503": "failed (HTTP 503)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said_in_words_with_a_way_out(serve, model, monkeypatch, fault):
    from comparator.runtimes.endpoint import problems

    monkeypatch.setenv("COMPARATOR_ENDPOINT_KEY_TINY", SECRET)
    if fault == "slow":
        monkeypatch.setattr(problems, "READ_S", 0.3)
    server = serve()
    column = load(model)
    server.fault = fault
    with pytest.raises(UserError) as caught:
        generate(column, model)
    column.unload()
    assert FAULTS[fault] in caught.value.problem and caught.value.advice
    assert "endpoint@tiny" in caught.value.problem or fault == "error"
    assert SECRET not in str(caught.value), "the key stands in a message"
    assert server.url not in str(caught.value), "visitors would see the address"
    if fault == "line":
        assert server.hung_up.wait(5), "the whole line was read"
    if fault != "slow":  # the same while it is looked at
        with pytest.raises(UserError) as caught:
            load(model)
        assert FAULTS[fault] in caught.value.problem


@pytest.mark.parametrize(
    ("limit", "value", "problem"),
    [("TOTAL_S", 0.2, "did not finish within"), ("MAX_BYTES", 2000, "sent more than")],
)
def test_an_answer_without_end_is_ended_here(serve, model, monkeypatch, limit, value, problem):
    from comparator.runtimes.endpoint import problems

    server = serve(says=lambda ids, step: np.eye(tiny_models.VOCABULARY, dtype=np.float32)[40])
    column = load(model)
    server.token_s = 0.01
    monkeypatch.setattr(problems, limit, value)
    with pytest.raises(UserError, match=problem):
        generate(column, model, max_new_tokens=100_000)
    assert server.hung_up.wait(5), "the server goes on computing for nobody"
    column.unload()


def test_a_connection_that_had_ended_while_it_was_idle_is_opened_anew(serve, model):
    server = serve()
    column = load(model)
    server.drops = 1
    assert generate(column, model).text == TEXT
    server.drops = 2
    with pytest.raises(UserError, match="in the middle of its answer"):
        generate(column, model)
    column.unload()


def test_nobody_there_and_no_tls(serve, model, settings_env):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        settings_env(endpoints=f"tiny=http://127.0.0.1:{bound.getsockname()[1]}/v1")
        with pytest.raises(UserError, match=r"cannot be reached.*Start the server"):
            load(model)
    server = serve()
    settings_env(endpoints=f"tiny={server.url.replace('http:', 'https:')}")
    with pytest.raises(UserError, match=r"TLS connection.*https"):
        load(model)


# ---------------------------------------------------------------- fidelity


def test_a_server_cannot_be_the_reference_and_takes_no_adapter(serve, model):
    from comparator.core.variant import Adapter
    from comparator.engines import get_engine

    serve()
    engine, never = get_engine(), threading.Event()
    with pytest.raises(UserError, match="adapters.*loads its own"):
        engine.load(LoadRequest(model.checkpoint.source, resolve("endpoint@tiny"), Adapter("pirate")), never)
    column = load(model)
    with pytest.raises(UserError, match="full logits.*most likely tokens"):
        list(column.answer_logits([1], [2], never))
    column.unload()
