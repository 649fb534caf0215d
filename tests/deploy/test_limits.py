"""Public mode: which limit, how far over it, and how to go on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import chdir
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from comparator.backends import resolve
from comparator.cli import app
from comparator.core.errors import UserError
from comparator.core.request import EvalSettings, GenerationSettings, Request
from comparator.core.settings import Settings
from comparator.core.state import ModelFacts
from comparator.core.variant import Adapter, Cell, Variant
from comparator.deploy.limits import (
    PUBLIC,
    Limits,
    auth_pairs,
    check_source,
    limits_of,
    parse_count,
    visitor,
)
from comparator.deploy.rate_limit import RateLimiter
from comparator.engine.local import LocalEngine
from comparator.training.registry import Trainings

REQUEST = Request(
    "smollm2-135m", (Cell(resolve("bf16")), Cell(resolve("nf4"))), "What is the capital of France?"
)


def refusal(limits: Limits, request: Request, **known) -> UserError:
    with pytest.raises(UserError) as caught:
        limits.check(request, **known)
    assert caught.value.advice, "the refusal says no way on"
    return caught.value


def public(**changes) -> Limits:
    return limits_of(Settings(public=True, **changes))


# ---------------------------------------------------------------- sizes


def test_an_ordinary_request_passes_everywhere():
    for limits in (limits_of(Settings(public=False)), public(), public(allowed_models="smollm2-135m")):
        limits.check(REQUEST, prompt_tokens=12, facts=ModelFacts("smollm2-135m", parameters=134_515_008))


@pytest.mark.parametrize(
    ("setting", "value", "request_", "known", "said"),
    [
        ("max_columns", 1, REQUEST, {}, "2 columns: the limit here is 1"),
        ("max_new_tokens", 63, REQUEST, {}, "64 new tokens: the limit here is 63"),
        ("max_prompt_tokens", 11, REQUEST, {"prompt_tokens": 12}, "12 prompt tokens: the limit here is 11"),
        ("max_prompt_tokens", 11, replace(REQUEST, prompt="x" * 221), {}, "221 characters in the prompt"),
        ("max_prompt_tokens", 11, replace(REQUEST, system="x" * 221), {}, "characters in the prompt"),
        ("max_tokens_per_comparison", 383,
         replace(REQUEST, settings=GenerationSettings(repeats=3)), {}, "2 columns × 64 new tokens × 3 runs"),
        ("max_evaluation_characters", 9,
         replace(REQUEST, fidelity="text", evaluation=EvalSettings("x" * 10)), {}, "10 characters in the text"),
        ("max_evaluation_tokens", 4_000,
         replace(REQUEST, fidelity="text", evaluation=EvalSettings("word " * 2000, context=512, stride=1)), {}, "tokens (about)"),
        ("max_model_parameters", "7B", REQUEST, {"facts": ModelFacts("big/one", parameters=7_000_000_001)}, "up to 7B"),
        ("allowed_models", "user/a, user/b", replace(REQUEST, model="user/c"), {}, "It accepts user/a, user/b"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_public", [True, False])
def test_a_refusal_names_the_limit_and_the_setting(setting, value, request_, known, said, is_public):
    limits = limits_of(Settings(public=is_public, **{setting: value}))
    problem = refusal(limits, request_, **known)
    assert said in str(problem)
    assert f"COMPARATOR_{setting.upper()}" in problem.problem, "the server's owner cannot tell what to set"


@pytest.mark.parametrize(
    ("setting", "value", "request_", "known"),
    [
        ("max_columns", 2, REQUEST, {}),
        ("max_new_tokens", 64, REQUEST, {}),
        ("max_prompt_tokens", 12, REQUEST, {"prompt_tokens": 12}),
        ("max_tokens_per_comparison", 384, replace(REQUEST, settings=GenerationSettings(repeats=3)), {}),
        (
            "max_evaluation_characters",
            10,
            replace(REQUEST, fidelity="text", evaluation=EvalSettings("x" * 10)),
            {},
        ),
        ("max_evaluation_characters", 9, replace(REQUEST, evaluation=EvalSettings("x" * 10)), {}),
        ("max_model_parameters", "7B", REQUEST, {"facts": ModelFacts("m/m", parameters=7_000_000_000)}),
    ],
)
def test_exactly_the_limit_is_allowed(setting, value, request_, known):
    limits_of(Settings(public=True, **{setting: value})).check(request_, **known)


def test_public_mode_limits_what_was_not_set_and_ones_own_machine_does_not():
    wide = replace(REQUEST, settings=GenerationSettings(max_new_tokens=1024, repeats=100))
    limits_of(Settings(public=False)).check(wide, facts=ModelFacts("m/m", parameters=10**12))
    assert "MAX_TOKENS_PER_COMPARISON" in refusal(public(), wide).problem
    assert (
        "MAX_MODEL_PARAMETERS"
        in refusal(public(), REQUEST, facts=ModelFacts("m/m", parameters=10**12)).problem
    )
    found = public()
    for name, value in PUBLIC.items():
        given = getattr(found, name)
        assert given == (parse_count(value) if isinstance(value, str) else value), name
        assert f"`COMPARATOR_{name.upper()}`" in TABLE, (
            f"docs/space.md does not list COMPARATOR_{name.upper()}"
        )


ROOT = __file__.rsplit("tests", 1)[0]
with open(ROOT + "docs/space.md", encoding="utf-8") as _file:
    TABLE = _file.read()


def test_every_setting_of_a_server_is_in_the_table():
    for name in (
        "public", "auth", "behind_proxy", "queue_size", "allowed_models", "max_columns", "max_new_tokens",
        "max_prompt_tokens", "hub_storage", "index_dir", "max_upload", "data_dir", *PUBLIC,
    ):  # fmt: skip
        assert name in Settings.model_fields
        assert f"`COMPARATOR_{name.upper()}`" in TABLE


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(
    "name",
    [
        "/etc", "/models/llama", "./model", "../model", "~/model", "model.gguf", "/x/y.gguf", "user/../../etc", "comparator",
        "tests", "comparator/ui", "C:\\models", "\\\\server\\share", "file:///etc", "http://example.org/x", "user/repo/../x",
        "", " ", "a/b/c", "user/repo\n", "user/repo\0", "user/repo@../x", ".", "-x/y", "user/répo", "pyproject.toml",
    ],
)  # fmt: skip
def test_in_public_no_path_is_opened(name, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    limits = public()
    assert "not from a path" in refusal(limits, replace(REQUEST, model=name)).problem
    in_variant = replace(REQUEST, cells=(Cell(Variant("gptq", source=name)),)) if name else None
    if in_variant:
        refusal(limits, in_variant)
    refusal(limits, replace(REQUEST, cells=(Cell(resolve("nf4"), Adapter(name)),)))


@pytest.mark.parametrize(
    "name", ["user/repo", "user/repo@main", "user/repo@refs/pr/1", "gpt2", "Qwen/Qwen3-0.6B"]
)
def test_in_public_hub_names_pass_and_on_ones_own_machine_paths_do(name):
    public().check(replace(REQUEST, model=name))
    limits_of(Settings(public=False)).check(replace(REQUEST, model="/models/" + name))


@pytest.mark.parametrize("value", ["/etc/passwd", "../x", "~/x", "pyproject.toml", "a\\b"])
def test_in_public_no_option_opens_a_file(value, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    asked = replace(REQUEST, cells=(Cell(Variant("gptq", options=(("cal", value),))),))
    assert "names a file" in refusal(public(), asked).problem
    limits_of(Settings(public=False)).check(asked)


def test_in_public_memory_is_the_servers_own():
    refusal(public(), replace(REQUEST, max_memory="0=1GiB"))


@pytest.mark.parametrize("is_public", [True, False])
@pytest.mark.parametrize(
    ("patterns", "name", "allowed"),
    [
        ("Qwen/*", "smollm2-135m", True),  # what is built in needs no entry
        ("Qwen/*", "SmolLM2-135M", True),
        ("Qwen/*", "qwen/Qwen3-4B", True),
        ("Qwen/*", "qwenx/y", False),
        ("Qwen/*", "Qwen", False),
        ("Qwen/*", "gpt2", False),
        ("user/x", "user/x", True),
        ("user/x", "user/x@main", True),
        ("user/x", "user/x@v1.0", True),
        ("user/x", "user/x@refs/pr/4", False),  # anybody can open a pull request
        ("user/x", "user/x@" + "ab" * 20, False),  # whose commits the Hub gives by their hash
        ("user/x", "user/x@" + "AB" * 20, False),
        ("user/x", "user/x@abcdef0", False),
        ("user/x@" + "ab" * 20, "user/x@" + "ab" * 20, True),
        ("user/x", "user/x@./refs/pr/4", False),
        ("user/x", "user/x@REFS/PR/4", False),
        ("user/x", "user/x@refs/convert/parquet", False),
        ("user/x", "user/x@refs/heads/main", True),
        ("user/*", "user/x@refs/pr/4", False),
        ("*", "user/x@refs/pr/4", False),
        ("user/x@refs/pr/*", "user/x@refs/pr/4", True),
        ("user/x@main", "user/x", True),  # a name without a revision is the branch main
        ("user/x@main", "user/x@main", True),
        ("user/x@main", "user/x@dev", False),
        ("user/x@v*", "user/x@v2", True),
        ("user/x@v*", "user/x", False),
        ("*/llama-*", "meta/Llama-3", True),
        ("*/llama-*", "meta/alpaca", False),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct", False),
        ("user/a, user/b", "user/b", True),
        ("", "anyone/anything@refs/pr/1", True),  # no list
    ],
)  # fmt: skip
def test_the_allow_list(patterns, name, allowed, is_public):
    limits = limits_of(Settings(public=is_public, allowed_models=patterns))
    source, _, revision = name.partition("@")
    as_model = replace(REQUEST, model=name)
    as_checkpoint = replace(REQUEST, cells=(Cell(Variant("gptq", source, revision or None)),))
    as_adapter = replace(REQUEST, cells=(Cell(resolve("nf4"), Adapter(source, revision or None)),))
    requests = [as_model, as_checkpoint, *([as_adapter] if "/" in source else [])]
    for request in requests:
        if allowed:
            limits.check(request)
        else:
            assert "ALLOWED_MODELS" in refusal(limits, request).problem


def test_adapters_that_are_built_in_or_trained_here_need_no_entry():
    public(allowed_models="Qwen/*").check(replace(REQUEST, cells=(Cell(resolve("nf4"), Adapter("pirate")),)))


def test_a_folder_is_allowed_by_its_path_on_a_private_server():
    limits = limits_of(Settings(public=False, allowed_models="/models/*, user/*"))
    limits.check(replace(REQUEST, model="/models/llama@home"))
    assert "ALLOWED_MODELS" in refusal(limits, replace(REQUEST, model="/etc")).problem


def test_the_engine_of_the_process_refuses_what_is_not_on_the_list(settings_env):
    """Below the page and the command line: whatever reaches the engine goes through the same list."""
    settings_env(allowed_models="Qwen/*")
    engine, stop = LocalEngine(Settings(), check_source), threading.Event()
    nf4, other = resolve("nf4"), Variant("gptq", "user/gptq", "refs/pr/1")
    attempts = {
        "the facts of a model": lambda: engine.facts("user/x"),
        "a model": lambda: engine.open("user/x", stop),
        "a checkpoint": lambda: engine.complete("smollm2-135m", Cell(other), stop),
        "an adapter": lambda: engine._plan(Adapter("user/lora"), None, nf4),
    }
    for what, attempt in attempts.items():
        with pytest.raises(UserError, match="ALLOWED_MODELS"):
            attempt()
            pytest.fail(f"the engine opened {what} that is not on the list")


def test_training_refuses_a_base_model_that_is_not_on_the_list(tmp_path):
    settings = Settings(public=False, allowed_models="Qwen/*", data_dir=tmp_path)
    with pytest.raises(UserError, match="ALLOWED_MODELS"):
        Trainings(LocalEngine(settings), settings)._checkpoint("user/x")


@pytest.mark.parametrize(
    "command",
    [["bench", "-m", "user/x", "-v", "bf16"], ["bench", "-v", "gptq@user/x"], ["quantize", "-m", "user/x", "-o", "out"],
     ["adapters", "user/x"]],
)  # fmt: skip
def test_commands_that_use_no_engine_refuse_what_is_not_on_the_list(command, tmp_path, settings_env):
    settings_env(allowed_models="Qwen/*")
    with chdir(tmp_path):
        result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError), f"{result.exception!r} {result.output}"
    assert "COMPARATOR_ALLOWED_MODELS" in result.exception.problem


def test_an_adapter_does_not_fit_a_base_model_that_is_not_on_the_list(settings_env):
    settings_env(allowed_models="Qwen/*")
    result = CliRunner().invoke(app, ["adapters", "pirate", "-m", "user/x"])
    assert result.exit_code == 1 and "COMPARATOR_ALLOWED_MODELS" in result.output


def test_run_refuses_what_is_not_on_the_list():
    command = [sys.executable, "-m", "comparator", "run", "-m", "user/x", "-v", "bf16", "-p", "Hello"]
    environment = {**os.environ, "COMPARATOR_ALLOWED_MODELS": "Qwen/*", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "COMPARATOR_ALLOWED_MODELS" in done.stderr, (
        f"exit {done.returncode}: {done.stderr[-500:]}"
    )


# ---------------------------------------------------------------- how often


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """`clock.now` is the time in seconds; it moves only when a test moves it."""
    clock = SimpleNamespace(now=1_000_000.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    return clock


def test_a_visitor_waits_and_the_others_do_not(clock):
    limiter = RateLimiter(public(requests_per_minute=2, requests_per_minute_total=100))
    limiter.admit("a")
    clock.now += 20
    limiter.admit("a")
    with pytest.raises(UserError, match="limit here is 2") as caught:
        limiter.admit("a")
    assert "in 40 s" in caught.value.advice
    limiter.admit("b")
    clock.now += 40.5
    limiter.admit("a")
    with pytest.raises(UserError):
        limiter.admit("a")


def test_everybody_together_has_a_limit_and_refusals_do_not_count(clock):
    limiter = RateLimiter(public(requests_per_minute=2, requests_per_minute_total=3))
    for who in "aab":
        limiter.admit(who)
    for _ in range(50):
        with pytest.raises(UserError, match="all visitors together"):
            limiter.admit("b")
    clock.now += 60.5
    limiter.admit("b")
    limiter.admit("b")


def test_a_few_who_take_all_leave_a_share_to_the_others(clock):
    limiter = RateLimiter(public(requests_per_minute=6, requests_per_minute_total=12))
    for who in "aaaaaabbbbbb":
        limiter.admit(who)
    for _ in range(4):  # 12 / 3 visitors
        limiter.admit("c")
    with pytest.raises(UserError, match="all visitors together"):
        limiter.admit("c")
    admitted = 0
    for number in range(100):  # addresses are cheap, so even that has an end
        try:
            limiter.admit(f"d{number}")
            admitted += 1
        except UserError:
            pass
    assert admitted == 2 * 12 - 16
    clock.now += 60.5
    limiter.admit("a")
    assert len(limiter._recent) <= 2 * 12 + 1


def test_on_ones_own_machine_nobody_counts():
    limiter = RateLimiter(limits_of(Settings(public=False)))
    for _ in range(1000):
        limiter.admit("me")
    assert not limiter._storage.events


def test_a_million_visitors_do_not_fill_the_memory(clock):
    limiter = RateLimiter(Limits(requests_per_minute=1))
    for number in range(30_000):
        clock.now += 0.001
        limiter.admit(str(number))
    assert len(limiter._storage.events) <= 10_001, "visitors are no longer forgotten"


def test_twenty_threads_get_exactly_what_there_is():
    limiter, let_in, lock = RateLimiter(Limits(requests_per_minute_total=100)), [], threading.Lock()

    def ask(who: int) -> None:
        for _ in range(20):
            try:
                limiter.admit(str(who))
            except UserError:
                continue
            with lock:
                let_in.append(who)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(let_in) == 100


# ---------------------------------------------------------------- who


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        ("8.8.4.4", "8.8.4.4"),
        ("1.1.1.1, 8.8.4.4", "8.8.4.4"),  # the visitor wrote the first himself
        ("8.8.4.4, 10.0.3.7", "8.8.4.4"),  # the last is the proxy's own
        ("10.0.0.1", "127.0.0.1"),
        ("<script>, ' OR 1", "127.0.0.1"),
        ("2606:4700:1:2:3:4:5:6", "2606:4700:1:2::"),  # one household
        ("", "127.0.0.1"),
    ],
)
def test_a_visitor_behind_a_proxy_is_the_last_public_address(forwarded, expected):
    behind = Settings(behind_proxy=True)
    assert visitor({"x-forwarded-for": forwarded}, "127.0.0.1", behind) == expected
    assert visitor({"x-forwarded-for": forwarded}, "127.0.0.1", Settings(behind_proxy=False)) == "127.0.0.1"
    assert visitor({}, None, behind) == "unknown"


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        (None, None), ("", None), ("secret", [("user", "secret")]), ("me:a:b", [("me", "a:b")]),
        ("me:x, you:y", [("me", "x"), ("you", "y")]),
    ],
)  # fmt: skip
def test_passwords_are_read(text, pairs):
    assert auth_pairs(Settings(auth=text)) == pairs


@pytest.mark.parametrize("text", ["me:", ":hunter2", "me:x,", ","])
def test_a_wrong_password_setting_is_told_without_quoting_it(text):
    settings = Settings(auth=text)
    with pytest.raises(UserError) as caught:
        auth_pairs(settings)
    assert "hunter2" not in str(caught.value) and "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "number"),
    [("135M", 135 * 10**6), ("8b", 8 * 10**9), ("1.5e9", 1_500_000_000), ("7_000", 7000), ("1T", 10**12)],
)
def test_counts_are_read(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "many", "-1", "8 bn", "1e999", "nan", "B"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(UserError):
        parse_count(text)


def test_visitors_may_use_listed_servers_and_name_none_of_their_own():
    """What a visitor names is opened by this machine, which may reach what the visitor cannot."""
    typed, listed, unlisted = (
        Request("smollm2-135m", (Cell(Variant("endpoint", source)),), "Hi")
        for source in ("http://169.254.169.254/v1", "vllm", "ollama")
    )
    servers = {"endpoints": "vllm=http://10.0.0.5:8000/v1"}
    public = limits_of(Settings(public=True, **servers))
    private = limits_of(Settings(public=False, **servers))
    public.check(listed)
    for request in (typed, unlisted):
        with pytest.raises(UserError, match=r"not an endpoint of this server.*It has vllm"):
            public.check(request)
    for request in (typed, listed, unlisted):  # an unknown name fails in its own column
        private.check(request)
    with pytest.raises(UserError, match="not an endpoint"):
        limits_of(Settings(public=False, allowed_models="user/*", **servers)).check(typed)
