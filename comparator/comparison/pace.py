"""How long the steps of earlier comparisons took on this machine, for the estimate of the next one.

One small JSON file in the cache folder: model → column → kind of step → seconds per unit. It is a convenience: a file that
cannot be read or written only costs the estimate.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from pathlib import Path

from comparator.util import disk

_FILE = "pace.json"
_MOST_MODELS, _MOST_COLUMNS = 50, 50
_LOCK = threading.Lock()


class Pace:
    """What is remembered; empty without a folder. `remember` writes it down."""

    def __init__(self, folder: Path | None = None):
        self._path = folder / _FILE if folder else None
        self._known: dict[str, dict[str, dict[str, float]]] = _read(self._path) if self._path else {}

    def recall(self, model: str, column: str, kind: str) -> float | None:
        """Seconds per unit of one kind of step, as it took last time; None if it never ran here."""
        return self._known.get(model, {}).get(column, {}).get(kind)

    def of_model(self, model: str, kind: str) -> list[float]:
        """The same of every column of the model that is known."""
        return [kinds[kind] for kinds in self._known.get(model, {}).values() if kind in kinds]

    def remember(self, model: str, measured: dict[str, dict[str, float]], fidelity: str) -> None:
        """Take in what `Plan.measured` gives of a run that ended, and write it down."""
        with _LOCK:
            known = _read(self._path) if self._path else self._known
            columns = known.pop(model, {})
            for column, kinds in measured.items():
                before = columns.pop(column, {})
                named = {f"{k}:{fidelity}" if k == "score" else k: v for k, v in kinds.items()}
                columns[column] = before | {k: round(v, 4) for k, v in named.items()}
            known[model] = dict(list(columns.items())[-_MOST_COLUMNS:])
            self._known = dict(list(known.items())[-_MOST_MODELS:])
            if self._path:
                with contextlib.suppress(OSError):
                    _write(self._path, self._known)


def _read(path: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        return {
            str(model): {
                str(column): {str(kind): float(s) for kind, s in kinds.items() if math.isfinite(float(s)) and s >= 0}
                for column, kinds in columns.items()
            }
            for model, columns in json.loads(path.read_text(encoding="utf-8")).items()
        }  # fmt: skip
    return {}


def _write(path: Path, known: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, json.dumps(known).encode())
