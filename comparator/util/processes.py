"""Python processes that this one starts."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def python_path() -> str:
    """PYTHONPATH for a process that imports this package whatever its working folder is: this package's folder first."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
