"""llama.cpp's C interface: what moves with a release of xllamacpp."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from comparator.util.compat import xllamacpp

ROOT = Path(__file__).resolve().parents[3]


def test_the_pin_is_the_release_that_the_layouts_are_of():
    (pin,) = re.findall(r"^xllamacpp==(\S+)$", (ROOT / "requirements-llamacpp.txt").read_text(), re.M)
    assert pin == xllamacpp.WRITTEN_FOR


def test_the_structs_lie_as_written():
    pytest.importorskip("xllamacpp", reason="requirements-llamacpp.txt is not installed")
    assert importlib.metadata.version("xllamacpp") == xllamacpp.WRITTEN_FOR
    # In another process: the library stays loaded, and brings threads of its own.
    script = "from comparator.util.compat import xllamacpp as x; print(x.layout_problem(x.load()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.strip() == "None", f"a struct of llama.h has moved: {done.stdout}{done.stderr}"


def test_a_struct_that_moved_is_named():
    class Moved:
        @staticmethod
        def llama_model_default_params():
            return xllamacpp.ModelParams(n_gpu_layers=99)

        @staticmethod
        def llama_context_default_params():
            return xllamacpp.ContextParams()

    assert xllamacpp.layout_problem(Moved) == "ModelParams.n_gpu_layers is 99, not -1"
