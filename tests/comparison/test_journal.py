"""An interrupted set goes on where it was: a real process, killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comparator.comparison.journal import Journal, open_journal
from comparator.core import document
from comparator.core.prompt_set import SetAnswer

PROMPTS = 40


def _command(model: Path, prompts: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "comparator", "run", "--model", str(model), "--prompts", str(prompts), "-v", "bf16", "-v", "fp32",
            "-n", "8", "--repeats", "1", *more]  # fmt: skip


def _lines(folder: Path) -> list[bytes]:
    files = list(folder.glob("prompt-sets/*.jsonl"))
    return files[0].read_bytes().splitlines(keepends=True) if files else []


@pytest.mark.slow  # two processes that import torch
def test_a_killed_run_loses_the_prompt_at_hand_alone(two_layers, tmp_path) -> None:
    prompts, data, output = tmp_path / "set.txt", tmp_path / "data", tmp_path / "set.json"
    prompts.write_text("".join(f"Tell me about number {n}.\n" for n in range(PROMPTS)))
    environment = os.environ | {"COMPARATOR_DATA_DIR": str(data), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        _command(two_layers, prompts),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(_lines(data)) < 5 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    finally:
        run.kill()
        errors = run.communicate()[1]
    whole = [line for line in _lines(data) if line.endswith(b"\n")]
    assert 5 <= len(whole) < 2 * PROMPTS, f"it was not killed in the middle; its stderr:\n{errors[-2000:]}"
    subprocess.run(
        _command(two_layers, prompts, "-o", str(output)), env=environment, check=True, capture_output=True
    )
    result = document.read(output).prompt_set
    assert result is not None and result.resumed == len(whole), (
        "an answer that was on the disk was made again"
    )
    for line in whole:
        column, prompt, answer, _ = json.loads(line)
        assert result.answers[column][prompt] == SetAnswer(**answer)
    assert all(
        a and a.error is None and (at == 1 or a.kl is not None)
        for at, c in enumerate(result.answers)
        for a in c
    )
    assert not _lines(data), "the journal of a run that ended is still there"


@pytest.mark.parametrize("rest", [b'[0, 1, {"text": "hal', b"[]\n", b"\0" * 20])
def test_what_a_killed_process_left_half_written_is_cut_off(tmp_path, rest: bytes) -> None:
    journal = open_journal(tmp_path, "key")
    journal.add(0, 0, SetAnswer("one"), [1, 2])
    assert open_journal(tmp_path, "key").answers == {}, "two processes took up one file"
    journal.close()
    path = next(p for p in tmp_path.glob("*.jsonl") if p.stat().st_size)
    with path.open("ab") as file:
        file.write(rest)
    again = Journal(path.open("r+b"))
    again.add(1, 0, SetAnswer("two"))
    again.close()
    last = Journal(path.open("r+b"))
    assert last.answers == {(0, 0): SetAnswer("one"), (1, 0): SetAnswer("two")} and last.tokens == {0: (1, 2)}
    last.close(remove=True)
    assert not path.exists()
