"""Names and folders of tasks → the harness's own task objects, with every request that they make of a model."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.request import TaskRequest
from comparator.util.compat.lm_eval import load_yaml, without_bars

INSTALL = "pip install -r requirements-tasks.txt"
MISSING = "Tasks need lm-evaluation-harness, which is not installed."
SEED, FEWSHOT_SEED = 0, 1234  # the harness's defaults


def require() -> str:
    """The installed release. Raises `UserError` without one."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise UserError(MISSING, INSTALL) from None


def is_installed() -> bool:
    return find_spec("lm_eval") is not None


@dataclass(frozen=True)
class Document:
    """One document of a task: its requests are the harness's `Instance` objects, in their order."""

    task: str
    number: int
    instances: tuple[Any, ...]


@dataclass
class Tasks:
    """Loaded tasks. `loaded`: what `TaskManager.load` gave."""

    asked: TaskRequest
    harness: str
    loaded: dict[str, Any]
    documents: list[Document] = field(default_factory=list)

    @property
    def by_name(self) -> dict[str, Any]:
        return self.loaded["tasks"]

    @property
    def name(self) -> str:
        return ", ".join(map(short, self.asked.names))

    def begin(self) -> None:
        """Few-shot examples are drawn again from the seed, as at the beginning of a run of the harness."""
        for task in self.by_name.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)


def short(name: str) -> str:
    """A task's name, or its folder's: where that lies on this machine is nobody's business."""
    return Path(name).expanduser().resolve().name if _yaml_files(name) else name


def load(asked: TaskRequest) -> Tasks:
    """Raises `UserError` for a task that is not known, whose data cannot be had, or that needs more than text."""
    harness = require()
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # its bootstrap would fork this process, with a model in it
    import numpy
    from lm_eval.tasks import TaskManager

    random.seed(SEED)  # some tasks shuffle their choices as they load
    numpy.random.seed(FEWSHOT_SEED)
    specs, named = [], []
    for name in asked.names:
        local = _yaml_files(name)
        specs += [_local(path) for path in local]
        named += [] if local else [name]
    without_bars()
    with _quiet():
        manager = TaskManager(include_defaults=bool(named))
        for name in named:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                meant = f"Did you mean {' or '.join(near)}? " if near else ""
                raise UserError(
                    f"lm-evaluation-harness {harness} has no task “{name[:80]}”.",
                    f"{meant}Name a task from its list, or a folder with a task's YAML.",
                )
        tasks = Tasks(asked, harness, _loaded(manager, [*named, *specs]))
        for task in tasks.by_name.values():
            _configure(task, asked)
        tasks.begin()
        for name, task in tasks.by_name.items():
            tasks.documents += _documents(name, task, asked.limit)
    return tasks


def _loaded(manager: Any, specs: list) -> dict[str, Any]:
    try:
        return manager.load(specs)
    except Exception as error:
        names = ", ".join(s if isinstance(s, str) else str(s["task"]) for s in specs)
        cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        raise UserError(
            f"The data of {names} cannot be loaded: {cause}",
            "It comes from the Hugging Face Hub at the first use. Without a network use a folder with a task's YAML and JSONL "
            "(docs/tasks.md).",
        ) from error


def _yaml_files(name: str) -> list[Path]:
    """The YAML files of tasks that a path names; empty for a name that is no path here."""
    path = Path(os.path.expanduser(name))
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return [path]
    if not path.is_dir():
        return []
    files = [p for p in sorted(path.glob("*.y*ml")) if "\ntask:" in f"\n{p.read_text(encoding='utf-8')}"]
    if not files:
        raise UserError(
            f"The folder {name} contains no YAML file with a line “task: NAME”.",
            "docs/tasks.md has an example.",
        )
    return files


def _local(path: Path) -> dict[str, Any]:
    """A task's settings, with the paths of its data files taken from its own folder."""
    try:
        config = load_yaml(path)
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{path.name} cannot be read as a task: {cause}", "docs/tasks.md has an example."
        ) from error
    if not isinstance(config.get("task"), str):
        raise UserError(f"{path.name} is a group of tasks.", "Name the folder, or the YAML of one task.")
    given = config.get("dataset_kwargs") or {}
    config["dataset_kwargs"] = {
        k: _beside(path.parent, v) if k in ("data_files", "data_dir") else v for k, v in given.items()
    }
    return config


def _beside(folder: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _beside(folder, one) for name, one in value.items()}
    if isinstance(value, list):
        return [_beside(folder, one) for one in value]
    here = folder.resolve() / str(value)
    return str(here) if here.exists() else value


def _configure(task: Any, asked: TaskRequest) -> None:
    """As `lm_eval.simple_evaluate` does."""
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        what = (
            "needs images or sound"
            if getattr(task, "MULTIMODAL", False)
            else "runs code that the model writes"
        )
        raise UserError(f"The task {task.task_name} {what}.", "Such tasks are not run here.")
    own = task.get_config("num_fewshot")
    if asked.fewshot is not None and own != 0:  # 0 in a task's own settings is never overridden
        task.set_config(key="num_fewshot", value=asked.fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _documents(name: str, task: Any, limit: int | None) -> list[Document]:
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    documents: dict[int, list[Any]] = {}
    for instance in task.instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    return [
        Document(name, number, tuple(sorted(instances, key=lambda i: i.idx)))
        for number, instances in documents.items()
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log and the progress bars of data sets."""
    import datasets

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
