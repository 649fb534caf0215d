"""`python -m comparator train`, without gradio, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
from typer.testing import CliRunner

pytest.importorskip("trl", reason="training needs trl")

from comparator.cli import app
from comparator.core.errors import UserError
from comparator.training.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny_models.save(folder / "tiny", "llama", chat=True)
    (folder / "block" / "gradio").mkdir(parents=True)
    (folder / "block" / "gradio" / "__init__.py").write_text(
        "raise ImportError('gradio is blocked in this test')\n"
    )
    rows = [{"frage": f"What is {n}?", "antwort": f"{n} is a number."} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def command(place: Path, *arguments: str) -> dict:
    path = os.pathsep.join([str(place / "block"), str(ROOT)])
    return {
        "args": [sys.executable, "-m", "comparator", "train", "--model", str(place / "tiny"), *arguments],
        "cwd": place,
        "env": os.environ | {"PYTHONPATH": path, "COMPARATOR_DATA_DIR": str(place / "home"), "NO_COLOR": "1"},
        "text": True,
    }


DATA = ("--data", "data.jsonl", "--column", "prompt=frage", "--column", "completion=antwort")


def test_it_trains_into_a_folder_and_compares(place, here):
    done = subprocess.run(
        **command(place, *DATA, "--base", "fp32", "--output", "mine", "--max-steps", "3", "--rank", "4",
                  "--compare", "fp32 bf16", "--zip", ".", "-p", "What is 3?"),
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "11 samples for training, 1 held out" in done.stderr and "step 3/3  loss" in done.stderr
    assert "trainable parameters" in done.stderr, "it began without saying what it takes"
    assert "Trained mine on fp32: 3 of 3 steps" in done.stdout
    rows = [line.split()[0:3] for line in done.stdout.splitlines() if line.startswith(("fp32", "bf16"))]
    assert [r[0] for r in rows] == ["fp32", "fp32", "bf16", "bf16"] and rows[1][1:] == ["+", "mine"]
    assert json.loads((place / "mine" / "adapter_config.json").read_text())["r"] == 4
    assert (place / "mine" / "training.json").is_file() and (place / "mine.zip").is_file()
    options = ("--model", place / "tiny", "--json", "-q")
    evaluated = here("train", "--evaluate", place / "mine", "--compare", "fp32", *options)
    assert evaluated.code == 0 and evaluated.err == "", evaluated.err
    rows = json.loads(evaluated.out)["evaluation"]["rows"]
    assert [bool(row["adapter"]) for row in rows] == [False, True] and rows[1]["loss"] > 0
    again = here("train", "--data", place / "data.jsonl", *DATA[2:], "--output", place / "mine", "--json")
    assert again.out == ""
    assert again.code == 2 and "already exists" in again.err


def test_json_is_one_document(place, here, own_engine, own_dirs):
    options = ("--model", place / "tiny", "--base", "fp32", "--json", "-q")
    data = ("--data", place / "data.jsonl", *DATA[2:])
    previewed = here("train", *data, "--preview", *options)
    assert previewed.code == 0 and previewed.err == "", previewed.err
    preview = json.loads(previewed.out)["preview"]
    assert preview["data"]["train_rows"] == 11 and preview["estimate"]["fits"]
    trained = here("train", *data, "--name", "mine", "--max-steps", "1", "--zip", own_dirs, *options)
    assert trained.code == 0 and trained.err == "", trained.err
    made = json.loads(trained.out)
    assert made["result"]["steps"] == 1 and Path(made["zip"]) == own_dirs / "mine.zip"
    listed = json.loads(here("train", "--list", "--json").out)
    assert [a["name"] for a in listed["adapters"]] == ["mine"] and listed["unfinished"] == []


def test_over_a_cluster_it_refuses_before_it_reads_anything(place, settings_env):
    from comparator import engines

    settings_env(ray_address="127.0.0.1:1")
    caches = (engines.get_engine, engines.get_trainings)
    for cached in caches:
        cached.cache_clear()
    try:
        result = CliRunner().invoke(app, ["train", "--data", str(place / "no-such-file"), "--base", "fp32"])
        assert isinstance(result.exception, UserError), f"{result.exception!r} {result.output}"
        assert "Ray cluster" in result.exception.problem and "trainable parameters" not in result.output
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_trained(place):
    child = subprocess.Popen(
        **command(place, *DATA, "--base", "fp32", "--name", "part", "--max-steps", "100000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        seen = ""
        limit = time.monotonic() + 120
        while "step 2/100000" not in seen and time.monotonic() < limit:
            seen += child.stderr.readline()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, err[-2000:]
    assert (
        "Stopped after" in out
        and (place / "home" / "adapters" / "part" / "adapter_model.safetensors").is_file()
    )


def test_every_setting_is_an_option_with_the_same_words():
    import typer

    options = {o: p for p in typer.main.get_command(app).commands["train"].params for o in p.opts}
    for setting in SETTINGS:
        assert setting.option in options, f"{setting.option} is missing"
        option = options[setting.option]
        default = " ".join(setting.default) if setting.kind == "names" else setting.default
        assert option.help.startswith(setting.help) and option.default == default, setting.option


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nothing.jsonl"], "There is no file nothing.jsonl"),
        ([], "No data is given"),
        (["--data", "pirate", "--rank", "0"], "Rank (r) is 0"),
        (["--data", "pirate", "--base", "nf5"], "There is no method"),
        (["--data", "pirate", "--column", "prompt"], "of the form ROLE=COLUMN"),
        (["--resume", "nobody"], "no unfinished training"),
        (["--evaluate", "nobody", "--compare", "bf16"], "No adapter “nobody”"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(arguments, said, own_dirs, builtin, monkeypatch):
    from comparator import engines
    from comparator.core.errors import UserError
    from comparator.core.settings import get_settings
    from comparator.training.registry import Trainings

    monkeypatch.setattr(get_settings(), "cache_dir", builtin.path.parent.parent)
    monkeypatch.setattr(
        engines, "get_trainings", lambda: Trainings(engines.get_engine(), settings=get_settings())
    )
    result = CliRunner().invoke(app, ["train", *arguments])
    assert isinstance(result.exception, UserError), result.output
    assert said in result.exception.problem
