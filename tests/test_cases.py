"""Inputs that users reported, one script each in `cases/`: what it makes, the command and the right result are in its head.

Each runs the command line in a process of its own, as a user would.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = sorted((ROOT / "tests" / "cases").glob("[0-9]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", CASES, ids=lambda script: script.stem)
def test_a_reported_input_ends_as_its_script_says(script: Path, builtin) -> None:
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        env=dict(os.environ),
    )
    assert ended.returncode == 0, f"{ended.stdout.strip()}\n{ended.stderr[-1500:]}"


def test_every_script_says_what_is_right() -> None:
    heads = {script.name: script.read_text(encoding="utf-8") for script in CASES}
    assert len(heads) >= 24
    assert not [name for name, text in heads.items() if "Right:" not in text]
