"""On a public server, what a stranger's files decide happens in another process, with limits on CPU time and memory.

`open_first` opens a checkpoint or an adapter there before this process reads any of its files; `IsolatedTokenizer` is a
checkpoint's tokenizer, which never comes here. The processes (`isolated_process.py`) start when they are needed, and again
after they were ended. They get none of this process's environment variables but what names folders, so neither a token
nor a password.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources.checkpoint import TOKENIZER_FILES, Checkpoint, Progress
from comparator.util import supervised
from comparator.util.line_process import LineProcess

OPEN_CPU_S, CALL_CPU_S = 60, 20  # of computing
OPEN_S, CALL_S = 180.0, 60.0  # of the clock, on a busy machine, the libraries' import included
BYTES = 4_000_000_000  # beyond what the libraries take
_ADVICE = "Choose another model, or run Quant Comparator on your own machine."


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "comparator.sources.isolated_process", str(BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=supervised.environment() | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
    )


process = LineProcess(_start, "isolated")  # for what has the device
beside = LineProcess(_start, "isolated-beside")  # for forms: a slow one delays nobody's comparison


def needed(revision: str | None) -> bool:
    """Whether a checkpoint is a stranger's: it comes from the Hub (it has a revision) and this server is public."""
    return revision is not None and get_settings().public


CHECKPOINT = "comparator.sources.isolated_process:open_checkpoint"
CONFIG = "comparator.sources.isolated_process:open_config"  # where there are no weights beside it


def open_first(
    path: Path,
    source: str,
    progress: Progress,
    opener: str = CHECKPOINT,
    where: LineProcess = process,
) -> None:
    """Raises `UserError` for what cannot be opened within the limits; `Stopped` if `progress` does.

    `path` names a commit, whose files never change: what was opened is remembered on the disk. `opener`
    ("package.module:function") is called there with the path and the source.
    """
    if was_opened(path, opener):
        return

    def meanwhile() -> None:
        progress(None, f"opening {source} in a separate process first")

    meanwhile()
    question = {"do": "open", "path": str(path), "source": source, "opener": opener}
    _ask(where, source, question, OPEN_CPU_S, OPEN_S, meanwhile)
    mark = _mark(path, opener)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def was_opened(path: Path, opener: str = CHECKPOINT) -> bool:
    return _mark(path, opener).exists()


def _mark(path: Path, opener: str = CHECKPOINT) -> Path:
    kind = "" if opener == CHECKPOINT else f" {opener}"
    digest = hashlib.sha256(f"{path.absolute()}{kind}".encode()).hexdigest()[:32]
    return get_settings().cache_dir / "opened" / digest


def _ask(
    where: LineProcess,
    source: str,
    question: dict[str, Any],
    cpu_s: float,
    seconds: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{"result", "cpu_s"}. Raises `UserError`, over a limit too."""
    try:
        line = where.ask(json.dumps(question | {"cpu_s": cpu_s}).encode(), seconds, meanwhile)
    except TimeoutError:
        raise UserError(
            f"{source} takes longer than {cpu_s:.0f} s of computing to open or to tokenize a text with.",
            _ADVICE,
        ) from None
    answer = json.loads(line) if line else {"memory": True}
    if "memory" in answer:
        limit = f"{BYTES / 1e9:g} GB"
        raise UserError(
            f"{source} takes more than {limit} of memory to open or to tokenize a text with.", _ADVICE
        )
    if "problem" in answer:
        raise UserError(answer["problem"], answer["advice"])
    return answer


class IsolatedTokenizer:
    """As much of a transformers tokenizer as comparisons and trainings use; each call is one question to the process.

    cpu_s: what all calls together may compute; None: each for itself. where: the process.
    """

    def __init__(self, checkpoint: Checkpoint, cpu_s: float | None = None, where: LineProcess | None = None):
        self.source, self.path = checkpoint.source, checkpoint.path
        self._left_s, self._where, self._lock = cpu_s, where or process, threading.Lock()
        facts = self._ask("facts")
        self._length = facts.pop("length")
        self.chat_template: Any = None
        self.special_tokens_map: dict[str, str] = {}
        vars(self).update(facts)  # bos_token, bos_token_id, eos_token …

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self._ask("encode", text=text, options=options)}

    def decode(self, ids: Any, **options: Any) -> str:
        return self._ask("decode", ids=[int(id) for id in ids], options=options)

    def get_vocab(self) -> dict[str, int]:
        return self._ask("vocabulary")

    def save_pretrained(self, target: str | Path) -> None:
        """Copies the files: nothing of them is changed."""
        for pattern in TOKENIZER_FILES:
            for file in self.path.glob(pattern):
                copy = shutil.copytree if file.is_dir() else shutil.copyfile
                copy(file, Path(target) / file.name)

    def __len__(self) -> int:
        return self._length

    def _ask(self, what: str, **more: Any) -> Any:
        with self._lock:
            cpu_s = CALL_CPU_S if self._left_s is None else min(CALL_CPU_S, self._left_s)
            if cpu_s <= 0:
                raise UserError(f"{self.source} takes too long to tokenize so much with.", _ADVICE)
            question = {"do": what, "path": str(self.path), **more}
            answer = _ask(self._where, self.source, question, cpu_s, CALL_S)
            if self._left_s is not None:
                self._left_s -= answer["cpu_s"]
            return answer["result"]
