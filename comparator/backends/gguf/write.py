"""A checkpoint → a GGUF file of one quantized type, written once and kept in the cache.

The gguf library quantizes and writes; what is here is what llama.cpp expects of each family. Norms and biases stay in
fp32, embedding and head have 8 bits at least. There is no tokenizer in the file: token ids are what a column gets.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from comparator.backends.base import Progress
from comparator.backends.ready_made import config_of
from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources import Checkpoint
from comparator.util import atomic_dir

TYPES = {"bf16": 16, "f16": 16, "q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}  # with their bits
# Families whose queries and keys have the rotary pairs beside each other in llama.cpp and half a head apart in
# transformers, and families in which both have them in one order.
TURNED = {"llama": True, "qwen2": False, "qwen3": False}
_VERSION = 1  # raise it when the same type gives other bytes
_BLOCK = 32  # values that share a scale, of all types above
_MODEL = "model.gguf"


_FAMILIES = {  # transformers' class → llama.cpp's architecture
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def check(checkpoint: Checkpoint) -> None:
    """Raises `UserError` for a model that is not written here."""
    config = config_of(checkpoint.path)
    if checkpoint.architecture not in _FAMILIES:
        raise UserError(
            f"No GGUF is made here of a {checkpoint.architecture}: of {', '.join(_FAMILIES)} only.",
            "Name a file that llama.cpp's own converter made: gguf@/path/model.gguf",
        )
    kind = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if kind != "default" or windowed:
        what = "a sliding window" if kind == "default" else f"rotary embeddings of the type {kind}"
        raise UserError(
            f"No GGUF is made here of {checkpoint.source}: it has {what}.",
            "Name a file that llama.cpp's own converter made: gguf@/path/model.gguf",
        )


def file_bytes(checkpoint: Checkpoint, kind: str) -> int:
    return round(sum(t.parameters * (_bits(t.name, t.shape, kind)) / 8 for t in checkpoint.tensors))


def make(checkpoint: Checkpoint, kind: str, progress: Progress) -> Path:
    """The file, from the cache or made now. Raises `UserError`, and what `progress` raises; nothing is left then."""
    check(checkpoint)
    key = hashlib.sha256(repr((_VERSION, kind, checkpoint.identity)).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", checkpoint.source)[-50:].strip("-.")
    folder = get_settings().cache_dir / "gguf" / f"{stem}-{kind}-{key}"
    need = file_bytes(checkpoint, kind)
    with atomic_dir.building(folder, progress=progress, need_bytes=need, what="the GGUF file") as tmp:
        if tmp is not None:
            _write(checkpoint, kind, tmp / _MODEL, progress)
    return folder / _MODEL


def _write(checkpoint: Checkpoint, kind: str, file: Path, progress: Progress) -> None:
    import gguf

    architecture, config = _FAMILIES[checkpoint.architecture], config_of(checkpoint.path)
    writer = gguf.GGUFWriter(file, architecture)
    _metadata(writer, config, checkpoint)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    for done, (name, weight) in enumerate(_weights(checkpoint)):
        progress(done / len(checkpoint.tensors), f"making a GGUF file of {kind.upper()}")
        if checkpoint.tied and name == "lm_head.weight":
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(
                f"{checkpoint.source} has a tensor that GGUF has no name for: {name}.", "Use nf4 or gptq."
            )
        if TURNED[architecture] and (part := re.search(r"\.([qk])_proj\.", name)):
            weight = _turn(weight, heads if part[1] == "q" else config.get("num_key_value_heads") or heads)
        stored = _kind(name, weight.shape, kind)
        number = getattr(gguf.GGMLQuantizationType, stored.upper())
        writer.add_tensor(theirs, gguf.quants.quantize(weight, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: Any, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings") or checkpoint.context_length or 2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _weights(checkpoint: Checkpoint) -> Any:
    """(name, float32 array) of every tensor, one at a time."""
    import torch
    from safetensors import safe_open

    for path in sorted(checkpoint.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():
                yield name, stored.get_tensor(name).to(torch.float32).numpy()


def _turn(weight: Any, heads: int) -> Any:
    """Rows (or a bias) of queries or keys in llama.cpp's order."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """How a tensor is stored where the file is of `kind`."""
    if len(shape) < 2:
        return "f32"
    if shape[-1] % _BLOCK:
        return "f16"
    at_least = "q8_0" if TYPES[kind] < 8 and re.search(r"embed_tokens|lm_head", name) else kind
    return at_least


def _bits(name: str, shape: tuple[int, ...], kind: str) -> float:
    """Bits per value, a scale (and minimum) of 16 bits per block included."""
    stored = _kind(name, shape, kind)
    if stored in ("f32", "f16", "bf16"):
        return 32 if stored == "f32" else 16
    return TYPES[stored] + (1.0 if stored.endswith("_1") else 0.5)
