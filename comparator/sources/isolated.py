"""On a public server, what a stranger's checkpoint decides happens in another process, with limits on time and memory.

`open_first` opens a checkpoint there before this process reads any of its files; `IsolatedTokenizer` is its tokenizer, which
never comes here. The process (`isolated_process.py`) starts when it is needed, and anew after it was ended. It gets
none of this process's environment variables but what names folders, so neither a token nor a password.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources.checkpoint import Checkpoint, Progress
from comparator.util import supervised
from comparator.util.line_process import LineProcess

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


process = LineProcess(_start, "isolated")


def needed(revision: str | None) -> bool:
    """Whether a checkpoint is a stranger's: it comes from the Hub (it has a revision) and this server is public."""
    return revision is not None and get_settings().public


def open_first(path: Path, source: str, progress: Progress) -> None:
    """Raises `UserError` for a checkpoint that cannot be opened within the limits; `Stopped` if `progress` does.

    `path` names a commit, whose files never change: one that was opened is remembered on the disk.
    """
    if was_opened(path):
        return
    progress(None, f"opening {source} in a process of its own first")
    _ask(source, {"do": "open", "path": str(path), "source": source}, OPEN_S, progress)
    mark = _mark(path)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def was_opened(path: Path) -> bool:
    return _mark(path).exists()


def _mark(path: Path) -> Path:
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    return get_settings().cache_dir / "opened" / digest


def _ask(source: str, question: dict[str, Any], seconds: float, progress: Progress | None = None) -> Any:
    def meanwhile() -> None:
        if progress is not None:
            progress(None, f"opening {source} in a process of its own first")

    try:
        line = process.ask(json.dumps(question).encode(), seconds, meanwhile)
    except TimeoutError:
        raise UserError(
            f"{source} takes longer than {seconds:g} s to open or to tokenize with.", _ADVICE
        ) from None
    answer = json.loads(line) if line else {"memory": True}
    if "memory" in answer:
        limit = f"{BYTES / 1e9:g} GB"
        raise UserError(f"{source} takes more than {limit} of memory to open or to tokenize with.", _ADVICE)
    if "problem" in answer:
        raise UserError(answer["problem"], answer["advice"])
    return answer["result"]


class IsolatedTokenizer:
    """As much of a transformers tokenizer as comparisons use; each call is one question to the process."""

    def __init__(self, checkpoint: Checkpoint):
        self.source, self.path = checkpoint.source, checkpoint.path
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

    def __len__(self) -> int:
        return self._length

    def _ask(self, what: str, **more: Any) -> Any:
        return _ask(self.source, {"do": what, "path": str(self.path), **more}, CALL_S)
