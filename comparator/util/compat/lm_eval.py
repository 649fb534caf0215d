"""What is used of lm-evaluation-harness beyond its documented names; written for lm_eval 0.4."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

WRITTEN_FOR = "0.4"


def load_yaml(path: Path) -> dict[str, Any]:
    """A task's YAML with what it includes; `!function` imports the Python file beside it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path)


def without_bars() -> None:
    """It draws a progress bar for each task, whoever calls it."""
    from lm_eval.api import task
    from tqdm import tqdm

    task.tqdm = partial(tqdm, disable=True)
