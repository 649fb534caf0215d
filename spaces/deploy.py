"""Stage this repository as a Hugging Face Space, and upload it.

    python spaces/deploy.py --repo you/quant-comparator --dry-run --output /tmp/tree     # look at what would go up
    python spaces/deploy.py --repo you/quant-comparator --hardware gpu                   # put it there

What is uploaded is exactly what `--dry-run` writes: README.md with the Space's front matter, requirements.txt for the
kind of hardware, app.py, LICENSE and comparator/. Needs `huggingface_hub` and a token (`hf auth login`, or HF_TOKEN)
only for the upload. This folder has no __init__.py, and never may: on a Space it would be taken for the package of
the same name; it is not uploaded.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_SKIP = shutil.ignore_patterns("__pycache__", "*.py[cod]", ".*", "*.egg-info")
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Hardware:
    requirements: str
    flavor: str  # what the README suggests
    python: str
    packages: bool  # whether Debian packages are needed to build


HARDWARE = {
    "cpu": Hardware("requirements-cpu.txt", "cpu-basic", "3.11", False),
    "gpu": Hardware("requirements-gpu.txt", "t4-small", "3.11", True),
    "zerogpu": Hardware("requirements-zerogpu.txt", "zero-a10g", "3.12", True),
}


def stage(folder: Path, hardware: str, title: str, torch_index: str | None = None) -> list[Path]:
    """Write the tree of a Space into `folder`, which has to be new or empty; returns its files, sorted.

    `torch_index` is the address of a package index to look at as well, such as the one that has torch for CPUs only.
    Raises `ValueError`.
    """
    if hardware not in HARDWARE:
        raise ValueError(f"“{hardware}” is not a kind of hardware; there are {', '.join(HARDWARE)}.")
    if not re.fullmatch(r"[^\n\"'{}:#]{1,60}", title):
        raise ValueError("A title is one line of up to 60 characters, without quotes, braces, colon and #.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty. Name a new folder.")
    kind = HARDWARE[hardware]
    folder.mkdir(parents=True, exist_ok=True)
    readme = (HERE / "README.template.md").read_text(encoding="utf-8")
    for name, value in {
        "title": title,
        "hardware": hardware,
        "flavor": kind.flavor,
        "python": kind.python,
    }.items():
        readme = readme.replace("{" + name + "}", value)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    requirements = (HERE / kind.requirements).read_text(encoding="utf-8")
    if torch_index:
        if not re.fullmatch(r"https://[^\s]+", torch_index):
            raise ValueError("--torch-index is an https address.")
        requirements = f"--extra-index-url {torch_index}\n{requirements}"
    (folder / "requirements.txt").write_text(requirements, encoding="utf-8")
    if kind.packages:
        shutil.copyfile(HERE / "packages.txt", folder / "packages.txt")
    for name in ("app.py", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "comparator", folder / "comparator", ignore=_SKIP)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def upload(folder: Path, repo: str, *, private: bool, flavor: str | None, variables: dict[str, str]) -> str:
    """Make the Space where it is missing, put the staged tree there in one commit; returns its address.

    Files of comparator/ that the tree no longer has are removed; nothing else on the Space is touched.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    for name, value in variables.items():
        api.add_space_variable(repo, name, value)
    api.upload_folder(
        repo_id=repo,
        repo_type="space",
        folder_path=folder,
        commit_message="Deploy Quant Comparator",
        delete_patterns=["comparator/*"],
    )
    if flavor:
        api.request_space_hardware(repo, flavor)
    return str(url)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="docs/space.md explains storage, secrets and limits."
    )
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="the Space, made if it is missing")
    parser.add_argument(
        "--hardware", choices=HARDWARE, default="cpu", help="which requirements (default: cpu)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only write the tree, to --output")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write the tree: a new or empty folder"
    )
    parser.add_argument("--title", default="Quant Comparator")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument(
        "--flavor", help="ask for this machine (t4-small, zero-a10g …); otherwise choose it on the page"
    )
    parser.add_argument(
        "--hub-storage", metavar="USER/NAME", help="keep saved comparisons in this dataset repo"
    )
    parser.add_argument(
        "--torch-index", metavar="URL", help="one more package index, say the one with torch for CPUs"
    )
    args = parser.parse_args(argv)
    for name in (args.repo, args.hub_storage):
        if name is not None and not _REPO.fullmatch(name):
            parser.error(f"“{name}” is not USER/NAME")
    if args.dry_run and args.output is None:
        parser.error("--dry-run needs --output DIR")
    with tempfile.TemporaryDirectory(prefix="comparator-space-") as temporary:
        folder = args.output or Path(temporary) / "tree"
        try:
            files = stage(folder, args.hardware, args.title, args.torch_index)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        total = sum(path.stat().st_size for path in files)
        for path in files:
            print(f"{path.stat().st_size:>10,}  {path.relative_to(folder)}")
        print(f"{total:>10,}  bytes in {len(files)} files for {args.hardware}")
        if args.dry_run:
            print(f"Nothing was uploaded. The tree is in {folder}.")
            return 0
        variables = {"COMPARATOR_HUB_STORAGE": args.hub_storage} if args.hub_storage else {}
        try:
            url = upload(folder, args.repo, private=args.private, flavor=args.flavor, variables=variables)
        except Exception as error:  # the client's many kinds; what a person needs is the sentence
            print(f"The upload failed: {error}", file=sys.stderr)
            print(
                "Log in with `hf auth login` as someone who may write there, and try again.", file=sys.stderr
            )
            return 1
        print(f"Uploaded to {url}")
        if args.hub_storage:
            print("Add HF_TOKEN under Settings → Secrets, so that the Space may write there.")
        return 0


if __name__ == "__main__":
    sys.exit(main())
