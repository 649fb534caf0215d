"""Private names of libraries are touched in comparator/util/compat alone, and each module there says for which release."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMPAT = ROOT / "comparator" / "util" / "compat"
GRADIO = ROOT / "comparator" / "ui" / "gradio_compat.py"
LIBRARIES = sorted(p.stem for p in COMPAT.glob("*.py") if p.stem != "__init__")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file itself gives to its functions, classes, fields and attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
    return names


def touched(source: str) -> list[tuple[int, str]]:
    """(line, code) of private names of others: attributes, imports, `getattr`; and of library objects assigned to."""
    tree = ast.parse(source)
    own, imported, found = own_names(tree), set(), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base = getattr(node, "module", None) or ""
            names = [f"{base}.{a.name}".strip(".") for a in node.names]
            if not base.startswith("comparator"):
                found += [(node.lineno, name) for name in names if any(map(is_private, name.split(".")))]
                if (base or names[0]).split(".")[0] not in sys.stdlib_module_names:
                    imported |= {(a.asname or a.name).split(".")[0] for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            foreign = is_private(node.attr) and node.attr not in own and of not in ("self", "cls", "os")
            patched = isinstance(node.ctx, ast.Store) and of.split(".")[0] in imported
            if foreign or patched:
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in own:
                found.append((node.lineno, ast.unparse(node)))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "model._supports_default_dynamic_cache()",
        "def f(model): return getattr(model, '_hf_hook', None)",
        "from torch._inductor import config",
        "import torch._dynamo",
        "from huggingface_hub.utils._xet import abort_xet_session",
        "from peft import PeftModel\nPeftModel.forward = None",
        "config._n_gpu = 1",
    ],
)
def test_a_private_name_is_noticed(code):
    assert touched(code), code


def test_what_is_our_own_is_not():
    code = "class A:\n    _seen: int = 0\n    def __init__(self):\n        self._x = 1\ndef f(a):\n    return a._seen, a._x"
    assert not touched(code)


def test_private_names_are_touched_in_compat_alone():
    elsewhere = [
        f"{path.relative_to(ROOT)}:{line}: {code}"
        for path in sorted((ROOT / "comparator").rglob("*.py"))
        if path.parent != COMPAT and path != GRADIO
        for line, code in touched(path.read_text(encoding="utf-8"))
    ]
    assert not elsewhere, (
        "Private names, or patches of a library: give them a function in comparator/util/compat/LIBRARY.py "
        "(Gradio's in comparator/ui/gradio_compat.py), with a test:\n" + "\n".join(elsewhere)
    )


@pytest.mark.parametrize("library", [*LIBRARIES, "gradio"])
def test_written_for_the_release_that_is_installed(library):
    module = "comparator.ui.gradio_compat" if library == "gradio" else f"comparator.util.compat.{library}"
    pytest.importorskip(library)
    compat = import_module(module)
    digits = (
        2 if compat.WRITTEN_FOR.startswith("0.") else 1
    )  # before 1.0 every minor release may change anything
    installed = version(library)
    assert compat.WRITTEN_FOR in compat.__doc__, f"the docstring of {module} names another release"
    assert installed.split(".")[:digits] == compat.WRITTEN_FOR.split(".")[:digits], (
        f"{library} {installed} is not the {compat.WRITTEN_FOR} that {module} was written for: read through it, run "
        "its tests, and change WRITTEN_FOR"
    )
