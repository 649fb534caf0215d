"""A GGUF file → a safetensors folder in the cache, made once by transformers and complete or not there.

The conversion runs in a process of its own (`convert_gguf.py`): Stop ends it at once, its memory is freed, and a
crash in it is only a message here.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

from comparator.core.errors import UserError
from comparator.core.state import ModelFacts
from comparator.sources import architectures, folder
from comparator.sources.checkpoint import Checkpoint, Progress
from comparator.sources.gguf_header import GgufHeader, read_gguf
from comparator.util import atomic_dir, processes

_VERSION = 2  # raise it when the conversion changes: what was written before is then written again
_ABOUT = "about.json"  # beside the weights: what the file was, and what a reader must know
_MODEL_TYPES = {  # llama.cpp's names → transformers', where they differ
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text", "gemma4": "gemma4_text",
    "command-r": "cohere", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2",
}  # fmt: skip


def open_gguf(
    file: Path,
    source: str,
    cache_dir: Path,
    progress: Progress,
    *,
    key: str | None = None,
    note: str | None = None,
) -> Checkpoint:
    """`key` identifies the file's content where that is known; else its path, size and time of change do.

    Raises `UserError` for a file that is damaged or that transformers cannot convert, `Stopped` when progress does.
    """
    path = converted_path(file, cache_dir, key)
    for attempt in range(2):
        _make(file, path, progress)
        try:
            about = folder.read_json(path / _ABOUT)
            notes = " ".join(filter(None, (note or about.get("origin"), *about.get("notes", []))))
            return folder.inspect(path, source, note=notes or None)
        except UserError:
            if attempt:
                raise
            atomic_dir.remove(path)  # somebody or something damaged it since: it is ours to make again
    raise AssertionError


def gguf_facts(file: Path, source: str, note: str | None = None) -> ModelFacts:
    """What the header alone tells, in well under a second, without converting."""
    header = read_gguf(file)
    vocabulary = header.of_model("vocab_size") or header.metadata.get("tokenizer.ggml.tokens")
    return ModelFacts(
        source=source,
        architecture=architectures.causal_class_of(_MODEL_TYPES.get(header.architecture, header.architecture))
        or header.architecture,
        parameters=header.parameters,
        dtype=header.dtype,
        context_length=header.of_model("context_length"),
        has_chat_template=bool(header.metadata.get("tokenizer.chat_template")),
        vocab_size=vocabulary if isinstance(vocabulary, int) else None,
        note=note or origin(header),
    )


def converted_path(file: Path, cache_dir: Path, key: str | None = None) -> Path:
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}.", "Check its path and permissions."
        ) from None
    identity = f"{_VERSION} {stat.st_size} {key or f'{file.resolve()} {stat.st_mtime_ns}'}"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-.")[:60] or "model"
    return cache_dir / "models" / f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def origin(header: GgufHeader) -> str:
    if header.quantization:
        return (
            f"Converted from a GGUF file of {header.quantization} weights. Results compare against this converted bf16, "
            "not the original model."
        )
    return f"Converted from a GGUF file of {header.dtype} weights."


def _make(file: Path, path: Path, progress: Progress) -> None:
    if path.exists():
        return
    header = read_gguf(file)
    bytes_each = 4 if header.dtype == "fp32" else 2
    need = header.parameters * bytes_each + 20 * 10**6
    with atomic_dir.building(
        path, progress=progress, need_bytes=need, what=f"the converted {file.name}"
    ) as tmp:
        if tmp is None:
            return
        convert(file, tmp, header.dtype, progress)
        about = folder.read_json(tmp / _ABOUT)
        about |= {"file": file.name, "bytes": file.stat().st_size, "origin": origin(header)}
        (tmp / _ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def convert(file: Path, target: Path, dtype: str, progress: Progress) -> None:
    """Run `convert_gguf.py` on the file. Raises `UserError` with its reason, `Stopped` when progress does."""
    started_s = time.monotonic()

    def report(fraction: float | None, message: str) -> None:
        progress(fraction, f"converting {file.name} once: {message} ({time.monotonic() - started_s:.0f} s)")

    request = {"file": str(file.resolve()), "target": str(target), "dtype": dtype}
    environment = processes.offline_environment(CUDA_VISIBLE_DEVICES="")
    ended = processes.run_reporting("comparator.sources.convert_gguf", request, environment, report)
    if ended.code:
        raise _failure(file, target, ended)


def _failure(file: Path, target: Path, ended: processes.Ended) -> Exception:
    if said := ended.problem:
        number = said.get("errno")
        error = OSError(number, said["problem"]) if number else Exception(said["problem"])
        if full := atomic_dir.disk_problem(error, target, file.name):
            return full
        return UserError(f"{file.name} cannot be converted: {said['problem']}", said.get("advice", ""))
    if ended.code < 0:
        return UserError(
            f"The conversion of {file.name} was ended by the system (signal {-ended.code}).",
            "The most likely cause is a lack of memory: converting takes about twice the size of the model in bf16. "
            "Unload variants or close other programs.",
        )
    return UserError(
        f"{file.name} cannot be converted: {ended.last_error}",
        "Use the model's safetensors checkpoint instead.",
    )
