"""Does an adapter fit a model? Judged by tensor names and shapes in their files, before anything is loaded.

Refuses only what is certain: a checkpoint may name its tensors otherwise than the model that is built from it
(transformers renames and fuses some), so what cannot be found here is judged again by the loaded model itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from comparator.adapters.describe import PROMPT_TYPES, AdapterFacts, is_own, module_of
from comparator.adapters.targets import short_name
from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL
from comparator.sources import Checkpoint
from comparator.sources.checkpoint import TensorInfo

# Names under which people know the models that come with the project.
_ALIASES = {BUILTIN_MODEL: ("smollm2-135m-instruct",)}
HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


# What a quantized copy of a model adds to its name: unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit, …-GPTQ-Int4, ….gguf
_QUANTIZED = re.compile(
    r"(?:[-_.](?:unsloth|dynamic|bnb|gptq|awq|gguf|exl2|hqq|nf4|fp4|fp8|int4|int8|w4a16|w8a8|[2348]bits?|"
    r"q\d\w*|bf16|fp16|128g|quantized))+$"
)


@dataclass(frozen=True)
class _Size:
    """Features of a linear layer (or rows and width of an embedding); None where the file does not tell."""

    outputs: int | None
    inputs: int | None


def check_fit(facts: AdapterFacts, checkpoint: Checkpoint) -> list[str]:
    """Notes for the column. Raises `UserError` naming the first module that does not fit."""
    sizes = _sizes(checkpoint)
    missing: list[str] = []
    found = 0
    for tensor in sorted(facts.tensors, key=lambda t: _natural(t.name)):
        module = module_of(tensor.name)
        if not module or facts.peft_type in PROMPT_TYPES:
            continue
        size = sizes.get(short_name(module))
        if size is None:
            missing.append(module)
            continue
        found += 1
        _check_shape(facts, checkpoint, module, tensor, size)
    if missing:
        _check_missing(facts, checkpoint, missing, found, sizes)
    if facts.peft_type in PROMPT_TYPES:
        _check_prompt(facts, checkpoint)
    return _name_notes(facts, checkpoint)


def _sizes(checkpoint: Checkpoint) -> dict[str, _Size]:
    sizes: dict[str, _Size] = {}
    for tensor in checkpoint.tensors:
        module, _, own = tensor.name.rpartition(".")
        if own == "weight" and len(tensor.shape) == 2 and tensor.dtype in ("fp32", "fp16", "bf16", "fp64"):
            sizes[short_name(module)] = _Size(*tensor.shape)
        elif own == "qweight" and len(tensor.shape) == 2:
            sizes[short_name(module)] = _Size(tensor.shape[1], None)
        else:
            sizes.setdefault(short_name(module), _Size(None, None))
    embedding = next((sizes[n] for n in EMBEDDINGS if n in sizes), None)
    if checkpoint.tied and embedding:
        for name in HEADS:
            sizes.setdefault(name, embedding)
    return sizes


def embedding_of(checkpoint: Checkpoint) -> str | None:
    """The name of the input embedding's module, shortened as `short_name` does."""
    found = {short_name(t.name.rpartition(".")[0]) for t in checkpoint.tensors}
    return next((n for n in EMBEDDINGS if n in found), None)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10: the first module that does not fit is the first from below."""
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]


def _check_shape(
    facts: AdapterFacts, checkpoint: Checkpoint, module: str, tensor: TensorInfo, size: _Size
) -> None:
    wanted = _expected(tensor, size, bool(facts.config.get("fan_in_fan_out")))
    if wanted is None:
        return
    have, need, axis = wanted
    if have == need:
        return
    is_vocabulary = (
        checkpoint.vocab_size is not None and need >= checkpoint.vocab_size and _is_vocabulary(module)
    )
    if is_vocabulary and axis != "width" and have > need:
        raise UserError(
            f"{facts.source} adds {have - need:,} token(s) to the vocabulary: its {module} has {have:,} rows, the "
            f"model {need:,}.",
            "The model would have to be resized, which changes every other column. Use an adapter that keeps the "
            "vocabulary, or a model that has these tokens.",
        )
    raise UserError(
        f"{facts.source} does not fit {checkpoint.source}: {module} has {need:,} {axis} here, and the adapter was "
        f"made for {have:,}.",
        _trained_on(facts),
    )


def _expected(tensor: TensorInfo, size: _Size, transposed: bool) -> tuple[int, int, str] | None:
    """(what the tensor has, what the model has, of what) where the two can be compared."""
    outputs, inputs = (size.inputs, size.outputs) if transposed else (size.outputs, size.inputs)
    shape, name = tensor.shape, tensor.name
    if len(shape) != 2:
        return None
    if re.search(r"\.lora_A(?:\.weight)?$", name) and inputs is not None:
        return shape[1], inputs, "input features"
    if re.search(r"\.lora_B(?:\.weight)?$", name) and outputs is not None:
        return shape[0], outputs, "output features"
    if name.endswith(".lora_embedding_A") and size.outputs is not None:
        return shape[1], size.outputs, "rows"
    if name.endswith(".lora_embedding_B") and size.inputs is not None:
        return shape[0], size.inputs, "width"
    if not is_own(name) and name.endswith(".weight") and size.outputs is not None and size.inputs is not None:
        if shape[1] != size.inputs:
            return shape[1], size.inputs, "width"
        return shape[0], size.outputs, "rows"
    return None


def _is_vocabulary(module: str) -> bool:
    return module.rpartition(".")[2] in HEADS + EMBEDDINGS


def _check_missing(
    facts: AdapterFacts, checkpoint: Checkpoint, missing: list[str], found: int, sizes: dict[str, _Size]
) -> None:
    patterns = {re.sub(r"\d+", "#", name) for name in sizes}
    numbered = [m for m in missing if re.sub(r"\d+", "#", short_name(m)) in patterns]
    if found and not numbered:
        return  # renamed or fused by transformers, perhaps: the loaded model will tell
    first = (numbered or missing)[0]
    raise UserError(
        f"{facts.source} does not fit {checkpoint.source} ({checkpoint.architecture}): the model has no {first}.",
        _trained_on(facts),
    )


def _check_prompt(facts: AdapterFacts, checkpoint: Checkpoint) -> None:
    """Prompt tuning stores (virtual tokens, hidden size); the embedding tells the hidden size."""
    width = next(
        (t.shape[-1] for t in checkpoint.tensors if short_name(t.name.rpartition(".")[0]) in EMBEDDINGS),
        None,
    )
    stored = next((t for t in facts.tensors if t.name == "prompt_embeddings"), None)
    if facts.peft_type == "PREFIX_TUNING" or width is None or stored is None or len(stored.shape) != 2:
        return
    if stored.shape[1] != width:
        raise UserError(
            f"{facts.source} does not fit {checkpoint.source}: its virtual tokens are {stored.shape[1]:,} wide, the "
            f"model's are {width:,}.",
            _trained_on(facts),
        )


def _trained_on(facts: AdapterFacts) -> str:
    if facts.base_model:
        return f"It was trained on {facts.base_model}: choose that model, or another adapter."
    return "Choose the model it was trained on, or another adapter."


def _name_notes(facts: AdapterFacts, checkpoint: Checkpoint) -> list[str]:
    if not facts.base_model or _same_model(facts.base_model, checkpoint):
        return []
    return [
        f"The adapter was trained on {facts.base_model}, and this model is {checkpoint.source}. Its shapes fit; only the "
        "answers show whether its effect carries over."
    ]


def _same_model(trained_on: str, checkpoint: Checkpoint) -> bool:
    """By the last part of the name: a mirror, a local copy, a cached folder or a quantized copy of the same model is
    the same."""

    def key(name: str) -> str:
        parts = [p for p in re.split(r"[\\/]", name.partition("@")[0].rstrip("\\/")) if p]
        snapshot = len(parts) > 2 and parts[-2] == "snapshots"
        last = parts[-3].rpartition("--")[2] if snapshot else parts[-1] if parts else ""
        return _QUANTIZED.sub("", last.lower()).removeprefix("meta-")

    names = {key(checkpoint.source), key(str(checkpoint.path)), *_ALIASES.get(checkpoint.source, ())}
    return key(trained_on) in names
