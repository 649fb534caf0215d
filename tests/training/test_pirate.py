"""The script that makes the built-in adapter: its data, and that a seed gives the same file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_pirate", ROOT / "scripts" / "train_pirate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_answer_of_the_data_is_a_pirates(script):
    lines = [json.loads(line) for line in script.DATA.read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= 24
    assert all(set(line) == {"prompt", "completion"} for line in lines)
    assert all(line["completion"].startswith("Arr, matey!") for line in lines)
    assert len({line["prompt"] for line in lines}) == len(lines), "a prompt stands twice"


def test_the_loss_covers_answers_alone(script):
    made = script.batch([([5, 6, 7, 8], 2), ([5, 9], 1)], pad=0)
    assert made["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_the_same_seed_gives_the_same_file(script, two_layers, tmp_path):
    """Two steps of two samples: the order, the first weights and every gradient go into it."""
    files = []
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        script.train(tmp_path / name, str(two_layers), seed=seed, steps=2, size=2, say=lambda _: None)
        files.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir() if f.name != "README.md"})
    assert files[0] == files[1]
    assert files[0]["adapter_model.safetensors"] != files[2]["adapter_model.safetensors"]
    assert set(files[0]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in files[0]["adapter_config.json"].decode(), (
        "a path of this machine is in the config"
    )
