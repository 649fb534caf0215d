"""A data source → samples: built in, a file, or a data set of the Hub; columns are detected.

A sample is a plain dict: {"row": 3, "messages": […]}, {"row": 3, "prompt": …, "completion": …} or {"row": 3, "text": …}.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.settings import Settings, get_settings
from comparator.training import strangers_data
from comparator.training.columns import Columns, recognize, sample_of
from comparator.training.types import FORMS, DataSource, Form
from comparator.util import formatting

Progress = Callable[[float | None, str], None]
_BUILTIN = Path(__file__).resolve().parent.parent / "data" / "datasets"
MOST_BYTES = 512 * 2**20
_HUB = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]%:-]+))?", re.ASCII
)
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Data:
    """The samples. `skipped`: (row, reason) of rows with nothing to train on. Rows are counted from 1."""

    title: str
    form: Form
    columns: tuple[tuple[str, str], ...]
    other_columns: tuple[str, ...]
    samples: tuple[dict[str, Any], ...]
    skipped: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 of the samples; it does not depend on the file format."""
        digest = hashlib.sha256(self.form.encode())
        for sample in self.samples:
            content = {k: v for k, v in sample.items() if k != "row"}
            digest.update(
                json.dumps(content, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
            )
        return digest.hexdigest()


def builtin_names() -> list[str]:
    """Names of the bundled data sets."""
    return sorted(p.stem for p in _BUILTIN.glob("*.jsonl"))


def builtin_path(name: str) -> Path:
    """The file of a built-in data set. Raises `UserError` for an unknown name."""
    if name not in builtin_names():
        raise UserError(f"There is no data set “{name}”.", f"Built in: {', '.join(builtin_names())}.")
    return _BUILTIN / f"{name}.jsonl"


def read(data: DataSource, settings: Settings | None = None, progress: Progress | None = None) -> Data:
    """Load a data source. Raises `UserError` for data that cannot be read, or has nothing to train on."""
    settings = settings or get_settings()
    text = data.source.strip()
    if not text:
        raise UserError(
            "No data is selected.", f"Name a file, {' or '.join(builtin_names())}, or a data set of the Hub."
        )
    if text.lower() in builtin_names():
        rows = rows_of(builtin_path(text.lower()), data.title)
    elif data.uploaded or _is_file(text, settings.public):
        file = _local(text, data, settings)
        rows = (
            strangers_data.file(file, data.title, settings) if settings.public else rows_of(file, data.title)
        )
    elif match := _HUB.fullmatch(text):
        named = match["repo"], match["revision"], match["split"]
        rows = strangers_data.hub(*named, settings) if settings.public else list(from_hub(*named, progress))
    else:
        raise UserError(
            f"There is no data “{text[:200]}”.",
            f"Name a file ({', '.join(ENDINGS)}), a built-in data set ({', '.join(builtin_names())}), or one of the "
            "Hub: user/name, user/name@revision, user/name:split.",
        )  # fmt: skip
    return from_rows(rows, data)


def from_rows(rows: list[dict[str, Any]], data: DataSource) -> Data:
    """Rows with columns → samples. Raises `UserError` for 0 rows, wrong columns, or rows that are all empty."""
    if not rows:
        raise UserError(f"{data.title} contains no samples.", "It needs at least one row.")
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    columns = recognize(list(names), rows, data)
    samples, skipped = [], []
    for number, row in enumerate(rows, 1):
        sample, reason = sample_of(row, columns)
        if sample is None:
            skipped.append((number, reason))
        else:
            samples.append({"row": number, **sample})
    if not samples:
        number, reason = skipped[0]
        raise UserError(
            f"None of the {len(rows):,} rows of {data.title} can be used; row {number:,}: {reason}.",
            f"Read as {FORMS[columns.form]}. {_roles(columns)}",
        )
    used = {name for _, name in columns.roles}
    return Data(
        data.title, columns.form, columns.roles, tuple(n for n in names if n not in used), tuple(samples), tuple(skipped)
    )  # fmt: skip


def _roles(columns: Columns) -> str:
    return "Columns used: " + ", ".join(f"{role} = {name}" for role, name in columns.roles) + "."


# ---------------------------------------------------------------- files


def _is_file(text: str, public: bool) -> bool:
    if text.startswith(("/", ".", "~")) or "\\" in text or text.lower().endswith((*ENDINGS, ".txt")):
        return True
    return not public and Path(text).is_file()


def _local(text: str, data: DataSource, settings: Settings) -> Path:
    if settings.public and not data.uploaded:
        raise UserError(
            "Files of the server cannot be opened here, because this is a public installation.",
            "Upload the file.",
        )
    path = Path(os.path.expanduser(text))
    if not path.is_file():
        raise UserError(
            f"{data.title} is a folder." if path.is_dir() else f"There is no file {data.title}.",
            "Check the path.",
        )
    return path


def rows_of(path: Path, title: str) -> list[dict[str, Any]]:
    """The rows of a file, told apart by its ending. Raises `UserError`."""
    ending = (Path(title).suffix or path.suffix).lower()
    if ending not in ENDINGS and path.suffix.lower() in ENDINGS:
        ending = path.suffix.lower()
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise UserError(
            f"{title} has {size / 1e6:,.0f} MB; at most {MOST_BYTES / 1e6:,.0f} MB are read.",
            "Use a part of it.",
        )
    if ending == ".parquet":
        return _parquet(path, title)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{title} cannot be read: {error.strerror or error}.", "Check its permissions."
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{title} is not UTF-8: line {line:,}, byte {error.start:,}.",
            "Save it as UTF-8 (a spreadsheet calls it “CSV UTF-8”).",
        ) from None
    if not text.strip():
        raise UserError(f"{title} is empty.", "It needs at least one row.")
    if ending in (".csv", ".tsv"):
        return _csv(text, title, "\t" if ending == ".tsv" else None)
    if ending == ".json" and text.lstrip().startswith("["):
        return _json_list(text, title)
    if ending in (".jsonl", ".json", ""):
        return _jsonl(text, title)
    raise UserError(f"{title} has an unsupported format ({ending}).", f"Supported: {', '.join(ENDINGS)}.")


def _jsonl(text: str, title: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = getattr(error, "msg", "nested too deeply")
            raise UserError(
                f"Line {number:,} of {title} is not JSON: {message}.",
                'JSONL has one object per line: {"prompt": "…", "completion": "…"}.',
            ) from None
        rows.append(_object(row, f"Line {number:,}", title))
    return rows


def _json_list(text: str, title: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{title} is not JSON: {getattr(error, 'msg', 'nested too deeply')}.",
            "Save it as JSONL, one object per line.",
        ) from None
    return [_object(row, f"Entry {n:,}", title) for n, row in enumerate(rows, 1)]


def _object(row: Any, where: str, title: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise UserError(
            f"{where} of {title} must be an object, not {type(row).__name__}.",
            'Each is an object with named columns: {"prompt": "…", "completion": "…"}.',
        )
    return row


def _csv(text: str, title: str, delimiter: str | None) -> list[dict[str, Any]]:
    csv.field_size_limit(MOST_BYTES)
    first = text.split("\n", 1)[0]
    if delimiter is None:
        delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
        rows = [{k: v for k, v in row.items() if k} for row in reader]
    except csv.Error as error:
        raise UserError(
            f"{title} cannot be read as CSV: {error}.", "Check its quotes, or save it as JSONL."
        ) from None
    return rows


def _parquet(path: Path, title: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    except ImportError:
        raise UserError(
            "Reading parquet needs pyarrow.", "pip install pyarrow, or save it as JSONL."
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"{title} cannot be read as parquet: {str(error)[:160]}", "Save it as JSONL."
        ) from None


# ---------------------------------------------------------------- the Hub


def from_hub(
    repo: str,
    revision: str | None,
    split: str | None,
    progress: Progress | None = None,
    streaming: bool = False,
) -> Iterator[dict[str, Any]]:
    """The rows of a data set of the Hub; `streaming`: as they come, with nothing kept. Raises `UserError`."""
    from comparator.sources import hub_problems
    from comparator.sources.hub_login import login

    if progress:
        progress(None, f"fetching {repo} from the Hub")
    try:
        import datasets

        datasets.disable_progress_bars()
        dataset = datasets.load_dataset(
            repo, revision=revision, split=split or "train", token=login(), streaming=streaming
        )
        yield from (dict(row) for row in dataset)
    except ImportError as error:
        raise UserError(
            f"Data sets of the Hub need the package datasets: {error}.", "pip install datasets"
        ) from None
    except ValueError as error:
        message = formatting.first_line(error, 200)
        raise UserError(
            f"{repo} cannot be read: {message}", f"Name a split: {repo}:test, for instance."
        ) from None
    except Exception as error:
        problem = hub_problems.explain(error, repo, revision)
        raise type(problem)(
            problem.problem, f"{problem.advice} A file works without the Hub ({', '.join(ENDINGS)})."
        ) from None
