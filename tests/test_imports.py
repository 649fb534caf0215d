"""Imports point one way, and what has to be quick imports nothing heavy. Read from the sources and in processes."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "comparator"

HEAVY = {
    "torch",
    "transformers",
    "bitsandbytes",
    "gptqmodel",
    "optimum",
    "peft",
    "accelerate",
    "gradio",
    "trl",
}


# Modules of classes that derive from a heavy library's; only functions, and each other, import them.
LAZY = {
    "comparator.backends.hqq.layer",
    "comparator.backends.hqq.quantizer",
    "comparator.backends.ct.layer",
    "comparator.backends.fp8.layer",
    "comparator.backends.stored_layers.quantizer",
}


def modules() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts]


def part(path: Path) -> str:
    """`comparator/backends/bnb.py` → backends; `comparator/core/result.py` → types."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, everywhere: bool = True) -> list[tuple[str, int]]:
    """(module, line) of what a file imports, outside `if TYPE_CHECKING`; `everywhere`: inside functions too."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; the others are absolute"
            base = node.module or ""
            # `from comparator import words` imports comparator.util.formatting
            found.extend(
                (f"{base}.{a.name}" if base == "comparator" else base, node.lineno) for a in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    """Run import-linter with the contracts of `root`'s pyproject.toml."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_package_imports_only_from_those_below_it():
    done = lint_imports(ROOT)
    assert done.returncode == 0, f"an import points upwards:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("comparator/core/errors.py", "import comparator.engine.local"),
        ("comparator/metrics/latency.py", "    from comparator.reporting import ratios"),
        ("comparator/reporting/summary.py", "    import torch"),
        ("comparator/cli/run.py", "    import gradio"),
    ],
)
def test_an_import_upwards_is_found_also_inside_a_function(tmp_path, path, line):
    shutil.copytree(PACKAGE, tmp_path / "comparator", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / path
    added = f"\n\ndef added():\n{line}\n" if line.startswith(" ") else f"\n\n{line}\n"
    changed.write_text(changed.read_text(encoding="utf-8") + added, encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode != 0, f"{line.strip()} in {path} was not noticed:\n{done.stdout}"


def test_the_contracts_name_every_package():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(c for c in contracts if c["type"] == "layers")
    named = {name.strip() for line in layers["layers"] for name in re.split("[|:]", line)}
    there = {
        p.name.removesuffix(".py")
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert named == there - {"__init__", "__main__"}, "a package without its place in the order of imports"
    assert len(there) <= 29, "the package's top is a table of contents: at most 29 packages and modules in it"


def test_heavy_libraries_load_inside_functions():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules()
        if ".".join(path.relative_to(ROOT).with_suffix("").parts) not in LAZY
        for module, line in imports(path, everywhere=False)
        if (module.split(".")[0] in HEAVY - {"gradio"} or module in LAZY) and path.name != "convert_gguf.py"
    ]
    assert not wrong, "the page would start slowly:\n" + "\n".join(wrong)


def test_only_one_module_imports_spaces():
    wrong = [
        p.name
        for p in modules()
        if any(m.split(".")[0] == "spaces" for m, _ in imports(p)) and p.name != "zerogpu.py"
    ]
    assert not wrong
    assert not (ROOT / "spaces" / "__init__.py").exists(), "it would shadow the package of that name"


def loaded_by(code: str, **environment: str) -> set[str]:
    """The top-level modules in memory after `code` ran in a fresh process."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


QUICK = ["comparator", "comparator.api", "comparator.engines", "comparator.comparison.runner", "comparator.__main__",
         "comparator.backends", "comparator.sources", "comparator.report", "comparator.document", "comparator.code",
         "comparator.reporting.plots.latency", "comparator.training.registry"]  # fmt: skip


def test_importing_loads_nothing_heavy():
    """All in one process: what one of them loads is found at once, and named."""
    loaded_by(
        "import importlib, sys\n"
        f"for module in {QUICK!r}:\n"
        "    importlib.import_module(module)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, f'importing {module} loads {sorted(heavy)}'\n"
        "from comparator.backends import methods; methods()\n"
        f"assert not {HEAVY!r} & set(sys.modules), 'the list of methods loads a library'"
    )


def test_building_the_page_does_not_import_torch():
    if not (PACKAGE / "ui" / "build.py").exists():
        pytest.skip("there is no page yet")
    loaded = loaded_by("from comparator.ui.build import build_ui; build_ui()")
    assert "gradio" in loaded
    assert not loaded & (HEAVY - {"gradio"}), f"the page waits for {sorted(loaded & HEAVY)}"


def test_ray_is_imported_only_where_an_address_is_set():
    """The page and a comparison in this process neither know of Ray nor wait for it; nor does the app of a cluster,
    whose driver is another process."""
    code = "from comparator.engines import get_engine; from comparator.comparison.runner import compare; get_engine().state()"
    for setting in ({}, {"COMPARATOR_RAY_ADDRESS": "127.0.0.1:1"}):
        loaded = loaded_by(code, **setting)
        assert not loaded & {"ray", "torch"}, f"{setting}: {sorted(loaded & {'ray', 'torch'})} was imported"
    inside = loaded_by(
        "import sys; from comparator.engines import get_engine; from comparator.comparison.runner import compare\n"
        "get_engine(); assert not [m for m in sys.modules if m.startswith('comparator.cluster')]"
    )
    assert "multiprocessing" not in inside, "the cluster's line to its driver costs every start something"


def test_what_the_readme_documents_is_importable_under_its_name():
    loaded_by(
        "import comparator; comparator.report.write, comparator.document.loads, comparator.code.snippet"
    )
    loaded_by(
        "from comparator import compare, run, resolve; assert resolve('nf4:dq').method == 'nf4'\n"
        "import comparator.types as t; assert t.Request is __import__('comparator').Request\n"
        "from comparator.report import write; from comparator.document import loads, dumps\n"
        "from comparator.code import snippet; from comparator.types import Comparison, UserError\n"
        "import comparator\ntry: comparator.compare(prompt='')\n"
        "except comparator.UserError as error: assert 'empty' in str(error), error\nelse: raise SystemExit('no error')\n"
        "try: comparator.nonsense\nexcept AttributeError: pass\nelse: raise SystemExit('no error')"
    )


def test_modules_stay_small():
    long = {
        p.relative_to(ROOT): n
        for p in modules()
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long, f"more than 400 lines: {long}"


def test_every_module_says_what_it_is():
    silent = [
        p.relative_to(ROOT)
        for p in modules()
        if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))
    ]
    assert not silent, f"no docstring: {silent}"


def test_the_readme_shows_the_package_as_it_is():
    block = (ROOT / "README.md").read_text(encoding="utf-8").rpartition("## Layout")[2].split("```")[1]
    inside = re.search(r"^comparator/\n((?:  .*\n)+)", block, re.M)[1]
    lines = [line for line in inside.splitlines() if not line.startswith("   ")]
    shown = {
        name.rstrip("/") for line in lines for name in re.findall(r"(?<!\S)[a-z_]+(?:/|\.py)(?!\S)", line)
    }
    there = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert shown == there, (
        f"the tree at the end of README.md differs from the folder: {sorted(shown ^ there)}"
    )
