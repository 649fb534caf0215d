"""What tests of the store share: a small comparison, another process, the index's files, all that a history lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from comparator.core.result import CellResult, PromptInfo
from tests.sample import comparison

ROOT = Path(__file__).resolve().parents[1]


def asked(prompt: str, *variants: str, **changes):
    """A comparison of a prompt; the rest is small, since a history needs no figures."""
    cells = tuple(CellResult(v, text="An answer.") for v in variants or ("bf16", "nf4"))
    return comparison(prompt=PromptInfo(prompt), cells=cells, **changes)


def run_python(code: str, *args: str, **env: str) -> subprocess.Popen:
    """Another process of this project, talking through its standard output."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def index_files(data_dir: Path) -> list[Path]:
    return sorted(data_dir.glob("index-*.sqlite3"))


def contents(saved) -> list:
    return saved.search(limit=500) + saved.search(limit=500, deleted=True)
