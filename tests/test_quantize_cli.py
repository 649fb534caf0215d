"""`python -m comparator quantize` as a person runs it: real processes, a real model of two layers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gptq_models
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two(builtin, tmp_path_factory) -> Path:
    return gptq_models.cut(builtin.path, tmp_path_factory.mktemp("cli") / "two")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "comparator", "quantize", *map(str, arguments)]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "COMPARATOR_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}


def quantize(cache: Path, *arguments: object, limit=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )


def test_it_writes_a_checkpoint_that_plain_transformers_loads(two, cache, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    output = tmp_path / "made"
    done = quantize(cache, "-m", two, "-v", "gptq:4bit,g32", "-o", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Wrote gptq:4bit,g32 to {output}\n", (
        "stdout is the result and nothing of the libraries"
    )
    assert "roughly" in done.stderr and "quantizing layer 2 of 2" in done.stderr and "left" in done.stderr
    assert "INFO" not in done.stderr and "GPT-QModel" not in done.stderr, "the libraries' noise stays out"
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

    again = quantize(cache, "-m", two, "-v", "gptq:g32", "-o", tmp_path / "again")
    assert again.returncode == 0 and "quantizing layer" not in again.stderr, "from the cache"
    one, other = (p / "model.safetensors" for p in (output, tmp_path / "again"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-v", "gptq:5bit"], ["5bit", "2, 3, 4, 8"]),
        (["-v", "gptq:g128"], ["128", "576", "g64"]),
        (["-v", "nf4"], ["nf4", "no checkpoint"]),
        (["-v", "gptq@me/repo"], ["Leave out the @"]),
        (["--calibration", "no-such-file.txt"], ["no-such-file.txt"]),
        (["--push-to-hub", "not a repo"], ["user/name"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_request_is_said_at_once(two, cache, tmp_path, arguments, words):
    done = quantize(cache, "-m", two, "-o", tmp_path / "made", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten(two, cache, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = quantize(cache, "-m", two, "-o", tmp_path)
    assert done.returncode == 2 and "there already" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_short_empty_and_strange_calibration(two, cache, tmp_path):
    for name, data, words in (
        ("short.txt", b"Only this.", "1,024"),
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"\xff\xfe\xfd", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        done = quantize(
            cache, "-m", two, "-v", "gptq:8bit", "-o", tmp_path / "made", "--calibration", tmp_path / name
        )
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "made").exists()
    assert made_of(cache, "8bit") == []


def test_ctrl_c_in_the_middle_leaves_nothing(two, cache, tmp_path):
    process = subprocess.Popen(
        command("-m", two, "-v", "gptq:3bit", "-o", tmp_path / "made"),
        cwd=ROOT, env=environment(cache), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "quantizing layer 1" in line:
            process.send_signal(signal.SIGINT)
            break
    start = time.monotonic()
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "nothing was kept" in rest and "Traceback" not in rest
    assert time.monotonic() - start < 60
    assert not (tmp_path / "made").exists() and made_of(cache, "3bit") == []


def test_a_full_disk_leaves_nothing(two, cache, tmp_path):
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    done = quantize(cache, "-m", two, "-v", "gptq:2bit", "-o", tmp_path / "made", limit=limit)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "COMPARATOR_CACHE_DIR" in done.stderr
    assert made_of(cache, "2bit") == [] and not (tmp_path / "made").exists()


def test_help_reads_well():
    done = subprocess.run([*command(), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("--variant", "--calibration", "--output", "--push-to-hub", "Examples"):
        assert word in done.stdout


def made_of(cache: Path, word: str) -> list[str]:
    root = cache / "gptq"
    return (
        [p.name for p in root.rglob("*") if word in p.name and ".locks" not in p.parts]
        if root.exists()
        else []
    )
