"""Calibration texts: the one that comes with this project, the user's own, c4 and WikiText-2 from the Hub → token ids.

A text of the user's own is stored in the cache under the hash of its content, and the hash is what a variant's notation
names (`cal=1a2b3c4d`): the same notation means the same text, or an error that it is not on this machine.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.core.variant import Variant
from comparator.util import disk, formatting
from comparator.util.atomic_dir import disk_problem

Progress = Callable[[float | None, str], None]

SHIPPED = Path(__file__).parents[1] / "data" / "calibration.txt"
FROM_HUB = ("c4", "wikitext2")
SAMPLE_TOKENS = 256
MINIMUM_TOKENS = 4 * SAMPLE_TOKENS
MOST_SAMPLES = 128  # the GPTQ paper's own number; more costs time and changes little
_HASH = re.compile(r"[0-9a-f]{8}")
_BETWEEN = "\n%%\n"  # between the documents of a text file
_LARGEST_BYTES = 64 * 10**6
MOST_STORED_BYTES = 200 * 10**6  # on a public server


def texts(name: str, cache_dir: Path, progress: Progress | None = None) -> list[str]:
    """The documents of a calibration: "" is the bundled text, else c4, wikitext2 or a hash. Raises `UserError`."""
    if not name:
        return _documents(SHIPPED.read_text(encoding="utf-8"))
    if name in FROM_HUB:
        (progress or _silent)(None, f"fetching {name} from the Hub")
        return _c4() if name == "c4" else _wikitext2()
    file = _path(name, cache_dir)
    if not file.is_file():
        raise UserError(
            f"The calibration text cal={name} is not on this machine.",
            "Provide it again: --calibration FILE on the command line, or the calibration field of the page. "
            "The same text has the same hash.",
        )
    return json.loads(file.read_text(encoding="utf-8"))


def fingerprint(documents: Iterable[str]) -> str:
    """Eight hex digits of the content."""
    digest = hashlib.sha256()
    for text in documents:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:8]


def is_name(text: str) -> bool:
    return text in FROM_HUB or bool(_HASH.fullmatch(text))


def check_name(text: str) -> None:
    """Raises `UserError` for the value of an option `cal` that cannot name a calibration; "" is the bundled text."""
    if text and not is_name(text):
        raise UserError(
            f"cal={text} is not a calibration text.",
            "cal= takes c4, wikitext2, or the eight hex digits of a text of your own; --calibration FILE stores the text "
            "and fills them in.",
        )


def store(source: str | Path | Iterable[str], cache_dir: Path) -> str:
    """Store a calibration text and return its name in a notation: "" for the bundled text.

    `source`: a file, c4, wikitext2, or the texts themselves. Raises `UserError` for a file that is missing, empty or
    not UTF-8, and where the cache cannot be written.
    """
    if isinstance(source, (str, Path)):
        if str(source) in FROM_HUB:
            return str(source)
        documents = read_file(Path(os.path.expanduser(source)))
    else:
        documents = _cleaned(source, "The calibration text")
    name = fingerprint(documents)
    if name == fingerprint(texts("", cache_dir)):
        return ""
    file = _path(name, cache_dir)
    _require_room(file)
    try:
        disk.make_folder(file.parent, 0o777)  # a cache may be shared; the text itself stays private
        disk.write(file, json.dumps(documents, ensure_ascii=False).encode())
    except OSError as error:
        problem = disk_problem(error, file, "the calibration text")
        raise problem or UserError(
            f"The calibration text cannot be stored: {error.strerror or error}."
        ) from error
    return name


def _require_room(file: Path) -> None:
    """Raises `UserError` on a public server that keeps as many calibration texts as it should; `file` is a new one."""
    if not get_settings().public or file.exists() or not file.parent.is_dir():
        return
    if sum(f.stat().st_size for f in file.parent.iterdir()) > MOST_STORED_BYTES:
        raise UserError(
            f"This server keeps {MOST_STORED_BYTES / 1e6:,.0f} MB of calibration texts and accepts no more.",
            f"Use {' or '.join(FROM_HUB)}, or run Quant Comparator on your own machine.",
        )


def applied_to(
    variant: Variant, source: str | Path | Iterable[str], cache_dir: Path | None = None
) -> Variant:
    """The variant with this calibration (see `store`) as its option `cal`. Raises `UserError`, also where it names
    another one already."""
    from comparator.backends import resolve

    name = store(source, cache_dir or get_settings().cache_dir)
    options = dict(variant.options)
    if options.get("cal") not in (None, name):
        raise UserError(
            f"{variant.notation} names the calibration {options['cal']}, and another text is given as well.",
            "Remove one of the two.",
        )
    if name:
        options["cal"] = name
    return resolve(replace(variant, options=tuple(options.items())))


def pasted(text: str) -> list[str]:
    """A pasted list: one document a line where every line is a JSON string, else parted by blank lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        documents = [json.loads(line) for line in lines]
        if documents and all(isinstance(item, str) for item in documents):
            return _cleaned(documents, "The calibration text")
    except ValueError:
        pass
    return _cleaned(re.split(r"\n\s*\n", text), "The calibration text")


def read_file(path: Path) -> list[str]:
    """.json: a list of strings; .jsonl: objects with "text", or strings; anything else: plain text in UTF-8, whose
    documents a line with %% may part. Raises `UserError`."""
    name = f"The calibration text {path.name}"
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UserError(
                f"{name} has {path.stat().st_size / 1e6:,.0f} MB.", "A few hundred kB are plenty."
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"There is no file {path}.", f"Name a text file, or {' or '.join(FROM_HUB)}."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder.", "Name one text file in it.") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}.", "Check its permissions."
        ) from None
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", data, data.find(b"\0"), 0, "binary")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text in UTF-8 (byte {error.start:,}).", "Save it as UTF-8.") from None
    if path.suffix.lower() in (".json", ".jsonl"):
        return _cleaned(_from_json(text, path), name)
    return _cleaned(_documents(text), name)


def _from_json(text: str, path: Path) -> list[str]:
    try:
        if path.suffix.lower() == ".jsonl":
            items = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            items = json.loads(text)
        documents = [item["text"] if isinstance(item, dict) else item for item in items]
        if isinstance(items, list) and all(isinstance(item, str) for item in documents):
            return documents
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(
        f"The calibration text {path.name} is not a list of texts.",
        'Write .json as ["first text", "second text"], and .jsonl as one {"text": "…"} per line.',
    )


def _documents(text: str) -> list[str]:
    return [part.strip("\n") for part in text.replace("\r\n", "\n").split(_BETWEEN) if part.strip()]


def _cleaned(texts: Iterable[str], name: str) -> list[str]:
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise UserError(
            f"{name} is empty.", f"Give at least {MINIMUM_TOKENS:,} tokens of varied text, a few pages."
        )
    return documents


def _path(name: str, cache_dir: Path) -> Path:
    if not _HASH.fullmatch(name):
        raise UserError(
            f"“{name}” is not a calibration text.", f"cal= takes {', '.join(FROM_HUB)}, or eight hex digits."
        )
    return cache_dir / "calibration" / f"{name}.json"


# ---------------------------------------------------------------- tokens


def samples(tokenizer: Any, documents: list[str], context: int | None = None) -> list[list[int]]:
    """The documents as samples of equal length, up to 128 of them, evenly spread over a longer text.

    Documents follow one another with an end-of-text token between, as in training. Raises `UserError` for too short
    a text, with both numbers.
    """
    length = min(SAMPLE_TOKENS, context or SAMPLE_TOKENS)
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) > 50 * MOST_SAMPLES * length:
            break
    if len(ids) < min(MINIMUM_TOKENS, 4 * length):
        raise UserError(
            f"The calibration text has {len(ids):,} tokens; at least {min(MINIMUM_TOKENS, 4 * length):,} are needed.",
            "Give a longer and varied text (a few pages), or omit it to use the bundled text.",
        )
    whole = len(ids) // length
    chosen = (
        range(whole) if whole <= MOST_SAMPLES else [i * whole // MOST_SAMPLES for i in range(MOST_SAMPLES)]
    )
    bos = tokenizer.bos_token_id if _starts_with_bos(tokenizer) else None
    parts = [ids[i * length : (i + 1) * length] for i in chosen]
    return [[bos, *part[: length - 1]] if bos is not None else part for part in parts]


def _starts_with_bos(tokenizer: Any) -> bool:
    first = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    return bool(first) and tokenizer.bos_token_id is not None and first[0] == tokenizer.bos_token_id


# ---------------------------------------------------------------- from the Hub


def _wikitext2() -> list[str]:
    """The training split, as plain text; the test split is for measuring, and stays out of it."""
    import zipfile

    path = _download("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext2")
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(n for n in archive.namelist() if n.endswith("wiki.train.raw"))
            text = archive.read(member).decode("utf-8")
    except (zipfile.BadZipFile, StopIteration, UnicodeDecodeError):
        raise _odd("wikitext2") from None
    articles = re.split(r"\n (?== [^=])", text)
    return [a for a in articles if len(a) > 500]


def _c4() -> list[str]:
    """The first documents of the validation split's first part (40 MB; a part of the training split has 300)."""
    path = _download("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "c4")
    documents: list[str] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                documents.append(json.loads(line)["text"])
                if len(documents) >= 512:
                    break
    except (OSError, EOFError, ValueError, KeyError):
        raise _odd("c4") from None
    return documents


def _download(repo: str, file: str, name: str) -> str:
    try:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repo, file, repo_type="dataset", etag_timeout=10)
    except Exception as error:  # huggingface_hub raises the errors of several HTTP libraries
        raise UserError(
            f"The calibration text {name} cannot be fetched from the Hub: {formatting.first_line(error, 160)}",
            "Try again when the Hub can be reached, give a file of your own, or omit cal= to use the bundled "
            "text.",
        ) from None


def _odd(name: str) -> UserError:
    return UserError(
        f"What the Hub sent as {name} cannot be read.",
        "Remove it from the Hub cache and try again, or give a file.",
    )


def _silent(fraction: float | None, message: str) -> None:
    pass
