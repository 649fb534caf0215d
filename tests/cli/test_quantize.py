"""`python -m comparator quantize` as a person runs it, on a real model of two layers."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comparator.cli import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(folder, settings_env) -> Path:
    """A cache that these tests share, in this process and in those that they start."""
    settings_env(cache_dir=folder)
    return folder


def started(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "comparator", "quantize", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_it_writes_a_checkpoint_that_plain_transformers_loads(two_layers, cache, here, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    output = tmp_path / "made"
    process = started("-m", two_layers, "-v", "gptq:4bit,g32", "-o", output)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == f"Wrote gptq:4bit,g32 to {output}\n", "stdout is the result and nothing of the libraries"
    assert "roughly" in err and "quantizing layer 2 of 2" in err and "left" in err
    assert "INFO" not in err and "GPT-QModel" not in err, "the libraries' noise stays out"
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["quant_method"]) == (4, 32, "gptq")
    model = AutoModelForCausalLM.from_pretrained(
        output,
        dtype=torch.float16,
        device_map="cpu",
        quantization_config=GPTQConfig(bits=4, backend="gptq_torch_aten"),
    )
    tokens = AutoTokenizer.from_pretrained(output)("Hello", return_tensors="pt")
    assert (
        model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1]
        == tokens["input_ids"].shape[1] + 3
    )

    again = here("quantize", "-m", two_layers, "-v", "gptq:g32", "-o", tmp_path / "again", "--json")
    assert again.code == 0 and "quantizing layer" not in again.err, "from the cache"
    written = {"variant": "gptq:4bit,g32", "folder": str(tmp_path / "again"), "uploaded": None}
    assert json.loads(again.out) == written | {"notation": f"gptq@{tmp_path / 'again'}"}
    one, other = (p / "model.safetensors" for p in (output, tmp_path / "again"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-v", "gptq:5bit"], ["5bit", "2, 3, 4, 8"]),
        (["-v", "gptq:g128"], ["128", "576", "g64"]),
        (["-v", "nf4"], ["nf4", "no checkpoint"]),
        (["-v", "gptq@me/repo"], ["Remove the @"]),
        (["--calibration", "no-such-file.txt"], ["no-such-file.txt"]),
        (["--push-to-hub", "not a repo"], ["user/name"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_request_is_said_at_once(two_layers, cache, here, tmp_path, arguments, words):
    done = here("quantize", "-m", two_layers, "-o", tmp_path / "made", *arguments)
    assert done.code == 2 and "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten(two_layers, cache, here, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = here("quantize", "-m", two_layers, "-o", tmp_path)
    assert done.code == 2 and "already exists" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_short_empty_and_strange_calibration(two_layers, cache, here, tmp_path):
    for name, data, words in (
        ("short.txt", b"Only this.", "1,024"),
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"\xff\xfe\xfd", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        given = "-v", "gptq:8bit", "-o", tmp_path / "made", "--calibration", tmp_path / name
        done = here("quantize", "-m", two_layers, *given)
        assert done.code == 2 and words in done.err, done.err
        assert "Traceback" not in done.err and not (tmp_path / "made").exists()
    assert made_of(cache, "8bit") == []


def test_ctrl_c_in_the_middle_leaves_nothing(two_layers, cache, tmp_path):
    process = started("-m", two_layers, "-v", "gptq:3bit", "-o", tmp_path / "made")
    for line in process.stderr:
        if "quantizing layer 1" in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "nothing was written" in rest and "Traceback" not in rest
    assert not (tmp_path / "made").exists() and made_of(cache, "3bit") == []


def test_a_full_disk_leaves_nothing(two_layers, cache, here, tmp_path):
    """A limit on the size of files, as a quota sets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        done = here("quantize", "-m", two_layers, "-v", "gptq:2bit", "-o", tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 2, done.err
    assert "Traceback" not in done.err and "COMPARATOR_CACHE_DIR" in done.err
    assert made_of(cache, "2bit") == [] and not (tmp_path / "made").exists()


def test_help_reads_well():
    done = CliRunner().invoke(app, ["quantize", "--help"])
    assert done.exit_code == 0
    for word in ("--variant", "--calibration", "--output", "--push-to-hub", "Examples"):
        assert word in done.output


def made_of(cache: Path, word: str) -> list[str]:
    root = cache / "gptq"
    return (
        [p.name for p in root.rglob("*") if word in p.name and ".locks" not in p.parts]
        if root.exists()
        else []
    )
