"""A local folder → `Checkpoint`, from config.json and the safetensors headers alone.

Loads no weights and imports neither torch nor transformers. Says by name what a folder lacks.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.sources import architectures, consistency, counting, weights
from comparator.sources.checkpoint import Checkpoint

_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "seq_len",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
               "tekken.json", "tiktoken.model", "qwen.tiktoken", "vocab.model")  # fmt: skip
_CARD_BYTES = 2**16  # of a model card: its metadata come first
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_SENTENCEPIECE = {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
_NO_VOCABULARY = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer", "ByT5TokenizerFast"}


def inspect(folder: Path, source: str, *, revision: str | None = None, note: str | None = None) -> Checkpoint:
    """Everything that is known before loading. Raises `UserError` for a folder that cannot be loaded."""
    names = [p.name for p in folder.iterdir()]
    config = read_config(folder, source)
    architectures.check_causal_lm(config, source)
    quantization = quantization_of(folder, config)
    stored = weights.read_folder(folder, source)
    consistency.check(source, config, quantization, [s.info for s in stored])
    check_tokenizer(folder, names, source)
    return described(
        folder, source, config, stored, counting.tied(config, stored), revision=revision, note=note
    )


def described(
    folder: Path,
    source: str,
    config: dict[str, Any],
    stored: list[weights.Stored],
    tied: tuple[bool, weights.Stored | None],
    *,
    revision: str | None,
    note: str | None,
) -> Checkpoint:
    """What config.json in `folder` and the tensors' headers say. `tied`: as `counting.tied` returns it."""
    is_tied, second_head = tied
    architecture = architectures.check_causal_lm(config, source)
    quantization = quantization_of(folder, config)
    text_only = architecture not in (config.get("architectures") or [architecture])
    if text_only:
        note = " ".join(filter(None, (note, "Only its text part is loaded.")))
        stored = [s for s in stored if not counting.is_other_sense(s.info)]
    return Checkpoint(
        source=source,
        path=folder,
        revision=revision,
        architecture=architecture,
        parameters=counting.parameters(stored, second_head, quantization),
        dtype=counting.dtype(stored),
        context_length=context_length(config),
        has_chat_template=has_chat_template(folder),
        vocab_size=vocab_size(config),
        tied=is_tied,
        note=note,
        tensors=tuple(s.info for s in stored),
        model_type=config["model_type"],
        quantization=quantization,
        base_model=base_model(folder, config) if quantization else None,
    )


def read_config(folder: Path, source: str) -> dict[str, Any]:
    """config.json as a dict. Raises `UserError` that says what the folder is instead, where that can be told."""
    if not (folder / "config.json").is_file():
        names = [p.name for p in folder.iterdir()]
        raise no_config(source, names, _adapter_base(folder))
    return read_json(folder / "config.json")


def no_config(source: str, names: Iterable[str], adapter_base: str | None = None) -> UserError:
    """Why there is no config.json among these files."""
    names = list(names)
    if "adapter_config.json" in names:
        base = f" It belongs to {adapter_base}." if adapter_base else ""
        return UserError(
            f"{source} is a LoRA adapter, not a model.{base}",
            "Add it as an adapter, and name its base as the model.",
        )
    if any(n.lower().endswith(".gguf") for n in names):
        return weights.no_weights(source, names)
    if "params.json" in names or any(n.startswith("consolidated") for n in names):
        return UserError(
            f"{source} is in its author's original format (params.json), without a config.json.",
            "Use the checkpoint in transformers' format, often the same name with “-hf”.",
        )
    if "model_index.json" in names:
        return UserError(
            f"{source} is a diffusers pipeline (it generates images), not a language model.", "Name another."
        )
    return UserError(
        f"{source} has no config.json.",
        "Name a folder or repo that contains config.json and safetensors files.",
    )


def _adapter_base(folder: Path) -> str | None:
    file = folder / "adapter_config.json"
    base = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    return str(base)[:200] if base else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from None
    except (ValueError, RecursionError):
        raise UserError(
            f"{file.name} in {file.parent} is not valid JSON.", "Download or copy it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{file.name} in {file.parent} does not contain a JSON object.", "Download or copy it again."
        )
    return value


def quantization_of(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """From config.json, or from AutoGPTQ's file beside it, which says gptq by being there."""
    found = config.get("quantization_config") or config.get("compression_config")
    if isinstance(found, dict):
        return found
    legacy = folder / "quantize_config.json"
    return {"quant_method": "gptq", **read_json(legacy)} if legacy.is_file() else None


def base_model(folder: Path, config: dict[str, Any]) -> str | None:
    """The model that a quantized one was made from: named by config.json, or by the head of its model card."""
    named = next(
        (config[k] for k in ("base_model", "base_model_name_or_path", "_name_or_path") if config.get(k)), None
    )
    card = folder / "README.md"
    if not isinstance(named, str) and card.is_file():
        with open(card, encoding="utf-8", errors="replace") as file:
            head = file.read(_CARD_BYTES).split("\n---", 1)[0]
        match = re.search(r"^base_model:\s*(?:\n\s*-\s*)?(\S+)\s*$", head, re.MULTILINE)
        named = match[1].strip("\"'") if match else None
    return named if isinstance(named, str) and _REPO.fullmatch(named) else None


def check_tokenizer(folder: Path, names: Iterable[str], source: str) -> None:
    """Raises `UserError` when no tokenizer can be made from these files."""
    found = {n for n in names if n in _TOKENIZERS or n.endswith((".tiktoken", "tekken.json"))}
    if "vocab.json" in found and not {"merges.txt", "tokenizer.json"} & set(names) and len(found) == 1:
        found.clear()  # half of a byte-pair tokenizer
    if not found:
        file = folder / "tokenizer_config.json"
        if file.is_file() and read_json(file).get("tokenizer_class") in _NO_VOCABULARY:
            return
        raise UserError(
            f"{source} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt).",
            "Copy the tokenizer's files of the original model into the folder.",
        )
    if found <= _SENTENCEPIECE and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{source} has its tokenizer as {sorted(found)[0]} only, and reading it requires the sentencepiece library.",
            "Run: pip install sentencepiece",
        )


def has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("chat_template"))


def context_length(config: dict[str, Any]) -> int | None:
    """Positions that the model was made for; None where its config sets no limit (BLOOM, Mamba)."""
    for part in (_text(config), config):
        for key in _CONTEXT:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9:
                return value
    return None


def vocab_size(config: dict[str, Any]) -> int | None:
    for part in (_text(config), config):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def _text(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config
