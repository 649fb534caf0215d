"""The process that renders chat templates (`render_template.py`).

It gets none of this process's environment variables, and one conversation at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from comparator.util.line_process import LineProcess

_PROGRAM = Path(__file__).with_name("render_template.py")


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_PROGRAM), *filter(None, sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("TZ", "SYSTEMROOT") if name in os.environ},
    )


process = LineProcess(_start, "chat template")
