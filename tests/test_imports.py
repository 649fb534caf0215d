"""Imports point one way, and what has to be quick imports nothing heavy. Read from the sources and in processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "comparator"

# The layers of docs/architecture.md, from the bottom; what is in none of them only may not close a circle.
LAYERS = (
    {"types", "notation", "settings"},
    {"backends", "sources"},
    {"pool", "generate", "adapters", "layers", "metrics", "words"},
    {"engine"},
    {"compare", "store", "share", "report", "report_html", "plots", "code", "document", "figures"},
    {"ui", "cli", "__main__"},
)
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
# Never, not even inside a function.
TORCH_FREE = {"types", "notation", "settings", "share", "store", "report", "report_html", "plots", "document", "figures",
              "words", "code", "api"}  # fmt: skip


def modules() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts]


def part(path: Path) -> str:
    """`comparator/backends/bnb.py` → backends; `comparator/types.py` → types."""
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
            # `from comparator import words` imports comparator.words
            found.extend(
                (f"{base}.{a.name}" if base == "comparator" else base, node.lineno) for a in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def graph(everywhere: bool = True) -> dict[str, dict[str, str]]:
    """part → the other parts it imports, each with one place where it does; `everywhere`: inside functions too."""
    found: dict[str, dict[str, str]] = {}
    for path in modules():
        mine = part(path)
        for module, line in imports(path, everywhere):
            parts = module.split(".")
            if parts[0] != "comparator" or len(parts) < 2 or mine in ("__init__", parts[1]):
                continue
            if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists():
                found.setdefault(mine, {})[parts[1]] = f"{path.relative_to(ROOT)}:{line}"
    return found


def test_imports_point_one_way():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    wrong = [
        f"{place}: {mine} imports {other}"
        for mine, others in graph().items()
        for other, place in others.items()
        if level.get(other, 0) > level.get(mine, len(LAYERS))
    ]
    assert not wrong, "an import points upwards:\n" + "\n".join(wrong)


def test_imports_make_no_circle():
    edges = graph(everywhere=False)

    def circle(name: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in way:
            return (*way[way.index(name) :], name)
        return next((c for other in edges.get(name, {}) if (c := circle(other, (*way, name)))), None)

    found = next((c for name in edges if (c := circle(name, ()))), None)
    assert not found, f"a circle: {' → '.join(found)}, for one {edges[found[0]][found[1]]}"


def test_only_the_page_knows_gradio():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        for module, line in imports(path)
        if module.split(".")[0] == "gradio" and part(path) != "ui"
    ]
    assert not wrong, f"gradio is imported outside comparator/ui: {wrong}"


def test_light_modules_never_import_anything_heavy():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules()
        for module, line in imports(path)
        if part(path) in TORCH_FREE and module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_load_inside_functions():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules()
        for module, line in imports(path, everywhere=False)
        if module.split(".")[0] in HEAVY - {"gradio"} and path.name != "convert_gguf.py"
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


QUICK = ["comparator", "comparator.engine", "comparator.compare", "comparator.__main__", "comparator.backends",
         "comparator.sources", "comparator.report", "comparator.plots", "comparator.document"]  # fmt: skip


@pytest.mark.parametrize("module", QUICK)
def test_importing_loads_nothing_heavy(module):
    loaded = loaded_by(f"import {module}; from comparator.backends import methods; methods()")
    assert not loaded & HEAVY, f"importing {module} loads {sorted(loaded & HEAVY)}"


def test_building_the_page_does_not_import_torch():
    if not (PACKAGE / "ui" / "build.py").exists():
        pytest.skip("there is no page yet")
    loaded = loaded_by("from comparator.ui.build import build_ui; build_ui()")
    assert "gradio" in loaded
    assert not loaded & (HEAVY - {"gradio"}), f"the page waits for {sorted(loaded & HEAVY)}"


def test_ray_is_imported_only_where_an_address_is_set():
    """The page and a comparison in this process neither know of Ray nor wait for it; nor does the app of a cluster,
    whose driver is another process."""
    code = "from comparator.engine import get_engine; from comparator.compare import compare; get_engine().state()"
    for setting in ({}, {"COMPARATOR_RAY_ADDRESS": "127.0.0.1:1"}):
        loaded = loaded_by(code, **setting)
        assert not loaded & {"ray", "torch"}, f"{setting}: {sorted(loaded & {'ray', 'torch'})} was imported"
    inside = loaded_by(
        "import sys; from comparator.engine import get_engine; from comparator.compare import compare\n"
        "get_engine(); assert not [m for m in sys.modules if m.startswith('comparator.cluster')]"
    )
    assert "multiprocessing" not in inside, "the cluster's line to its driver costs every start something"


def test_compare_is_a_module_and_a_function_whichever_comes_first():
    for first in (
        "import comparator; comparator.compare",
        "import comparator.compare",
        "from comparator.compare import compare; assert compare.__name__ == 'compare'",
        "from comparator import compare; assert callable(compare)",
        "import comparator.compare as c; assert callable(c) and c.checked",
        "from comparator import run, resolve; assert resolve('nf4:dq').method == 'nf4'",
    ):
        loaded_by(
            f"{first}\n"
            "import importlib, inspect, comparator, comparator.compare\n"
            "from comparator.compare import compare\n"
            "from comparator import compare as other\n"
            "assert callable(comparator.compare) and other is comparator.compare\n"
            "assert comparator.compare.compare is compare and inspect.isfunction(compare)\n"
            "importlib.reload(comparator.compare)\n"
            "assert callable(comparator.compare)\n"
            "try: comparator.compare(prompt='')\n"
            "except comparator.Problem as p: assert 'empty' in str(p), p\n"
            "else: raise SystemExit('no Problem')\n"
            "try: comparator.nonsense\n"
            "except AttributeError: pass\n"
            "else: raise SystemExit('no AttributeError')"
        )


def test_modules_stay_small():
    long = {
        p.relative_to(ROOT): n
        for p in modules()
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    long = {p: n for p, n in long.items() if p.name != "types.py"}  # the nouns: one list
    assert not long, f"more than 400 lines: {long}"


def test_every_module_says_what_it_is():
    silent = [
        p.relative_to(ROOT)
        for p in modules()
        if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))
    ]
    assert not silent, f"no docstring: {silent}"


def test_the_readme_names_every_part():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").rpartition("## Layout")[2]
    parts = {path.relative_to(PACKAGE).parts[0] for path in modules()} - {"__init__.py", "__main__.py"}
    missing = [name for name in sorted(parts) if name.removesuffix(".py") not in tree]
    assert not missing, f"not in the file tree at the end of README.md: {missing}"
