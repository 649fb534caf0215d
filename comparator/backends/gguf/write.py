"""A checkpoint → a GGUF file of one quantized type, written once and kept in the cache.

ggml quantizes, in a process of its own, and the gguf library writes; what is here is what llama.cpp expects of each family.
Norms and biases stay in fp32; embedding and head have 8 bits at least, beside K-quants 6 as llama-quantize has it. There is no tokenizer in the file: token ids are what a column gets.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparator.backends import sizes
from comparator.backends.base import Progress
from comparator.backends.gguf.quantizer import Quantizer
from comparator.backends.ready_made import config_of
from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.sources import Checkpoint, TensorInfo
from comparator.sources.convert_gguf import llama3_factors
from comparator.util import atomic_dir

TYPES = {  # that a file is made of, with their bits
    "bf16": 16, "f16": 16, "q8_0": 8, "q6_k": 6, "q5_k_m": 5, "q5_1": 5, "q5_0": 5, "q4_k_m": 4, "q4_1": 4, "q4_0": 4,
}  # fmt: skip
_BITS = {  # of a tensor's type, with the scales
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q5_1": 6, "q5_0": 5.5, "q4_k": 4.5,
    "q4_1": 5, "q4_0": 4.5,
}  # fmt: skip
_SMALLER = {
    "q6_k": "q8_0",
    "q5_k": "q5_1",
    "q4_k": "q5_0",
}  # where rows are no multiple of 256, as llama-quantize does
# Families whose queries and keys have the rotary pairs beside each other in llama.cpp and half a head apart in
# transformers, and families in which both have them in one order.
TURNED = {"llama": True, "qwen2": False, "qwen3": False}
_VERSION = 3  # raise it when the same type gives other bytes
_BLOCK, _LARGE_BLOCK = 32, 256  # values that share a scale; of K-quants
_LAYER = re.compile(r"layers\.(\d+)\.")
_VOCABULARY = re.compile(r"embed_tokens|lm_head")
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
            f"No GGUF is made here of a {checkpoint.architecture}: only of {', '.join(_FAMILIES)}.",
            "Name a file made by llama.cpp's own converter: gguf@/path/model.gguf",
        )
    kind = _rope(config).get("rope_type", "default")
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if kind not in ("default", "llama3") or windowed:
        what = "a sliding window" if windowed else f"rotary embeddings of the type {kind}"
        raise UserError(
            f"No GGUF is made here of {checkpoint.source}: it has {what}.",
            "Name a file made by llama.cpp's own converter: gguf@/path/model.gguf",
        )


def stored(checkpoint: Checkpoint, kind: str) -> Iterator[tuple[TensorInfo, str, int]]:
    """(tensor, ggml's type, bytes) of each tensor in a file of `kind`."""
    recipe = Recipe(checkpoint, kind)
    for tensor in sizes.held(checkpoint):
        bits = recipe.bits(tensor.name, tensor.shape)
        yield tensor, recipe.stored(tensor.name, tensor.shape), round(tensor.parameters * bits / 8)


def make(checkpoint: Checkpoint, kind: str, progress: Progress) -> Path:
    """The file, from the cache or made now. Raises `UserError`, and what `progress` raises; nothing is left then."""
    check(checkpoint)
    key = hashlib.sha256(repr((_VERSION, kind, checkpoint.identity)).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", checkpoint.source)[-50:].strip("-.")
    folder = get_settings().cache_dir / "gguf" / f"{stem}-{kind}-{key}"
    need = sum(size for _, _, size in stored(checkpoint, kind))
    with atomic_dir.building(folder, progress=progress, need_bytes=need, what="the GGUF file") as tmp:
        if tmp is not None:
            _write(checkpoint, kind, tmp / _MODEL, progress)
    return folder / _MODEL


def _write(checkpoint: Checkpoint, kind: str, file: Path, progress: Progress) -> None:
    """One tensor after another: only one is in memory."""
    import gguf
    import numpy as np

    architecture, config = _FAMILIES[checkpoint.architecture], config_of(checkpoint.path)
    writer, plan = gguf.GGUFWriter(file, architecture), _plan(checkpoint, kind)
    _metadata(writer, config, checkpoint)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for _, theirs, shape, number in plan:
        block, block_bytes = gguf.GGML_QUANT_SIZES[number]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), size, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    heads = {"q": config["num_attention_heads"], "k": _key_heads(config)}
    plain = [gguf.GGMLQuantizationType[n] for n in ("F32", "F16", "BF16")]
    with _Weights(checkpoint) as weights, Quantizer() as quantize:
        for done, (name, _, _, number) in enumerate(plan):
            progress(done / len(plan), f"making a GGUF file of {kind.upper()}")
            weight = weights(name)
            if TURNED[architecture] and (part := re.search(r"\.([qk])_proj\.", name)):
                weight = _turn(weight, heads[part[1]])
            stored = gguf.quants.quantize(weight, number) if number in plain else quantize(weight, number)
            writer.write_tensor_data(stored)
    writer.close()


def _plan(checkpoint: Checkpoint, kind: str) -> list[tuple[str, str, tuple[int, ...], Any]]:
    """(the checkpoint's name, GGUF's, shape, ggml type) of each tensor. Raises `UserError` for one without a name in GGUF."""
    import gguf

    architecture, config = _FAMILIES[checkpoint.architecture], config_of(checkpoint.path)
    names = gguf_names(architecture, config["num_hidden_layers"], checkpoint)
    recipe, plan = Recipe(checkpoint, kind), []
    for tensor in checkpoint.tensors:
        if checkpoint.is_tied_head(tensor.name):
            continue
        theirs = names.get(tensor.name)
        if theirs is None:
            raise UserError(
                f"{checkpoint.source} has a tensor for which GGUF has no name: {tensor.name}.",
                "Use nf4 or gptq.",
            )
        stored = recipe.stored(tensor.name, tensor.shape)
        plan.append((tensor.name, theirs, tensor.shape, gguf.GGMLQuantizationType[stored.upper()]))
    return plan


def gguf_names(architecture: str, blocks: int, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's names of tensors → GGUF's, by the gguf library's own table; without those that it does not know."""
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return {}
    table = gguf.get_tensor_name_map(known[architecture], blocks)
    pairs = ((t.name, table.get_name(t.name, try_suffixes=(".weight", ".bias"))) for t in checkpoint.tensors)
    return {ours: theirs for ours, theirs in pairs if theirs}


def _rope_factors(config: dict[str, Any]) -> Any | None:
    """Llama 3's rotary frequencies as factors, float32 (head width / 2,); None for plain ones."""
    import numpy as np

    rope = _rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factors = llama3_factors(_head_width(config) // 2, _theta(config), **{name: rope[name] for name in names})
    return np.array(factors, np.float32)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _theta(config: dict[str, Any]) -> float:
    return float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _head_width(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _key_heads(config: dict[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _metadata(writer: Any, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    width = _head_width(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings") or checkpoint.context_length or 2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(_key_heads(config))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


class _Weights:
    """`with _Weights(checkpoint) as weights: weights(name)`: a tensor as a float32 array."""

    def __init__(self, checkpoint: Checkpoint):
        self._files, self._open = sorted(checkpoint.path.glob("*.safetensors")), contextlib.ExitStack()
        self._by_name: dict[str, Any] = {}

    def __enter__(self) -> _Weights:
        from safetensors import safe_open

        for path in self._files:
            stored = self._open.enter_context(safe_open(path, framework="pt"))
            self._by_name |= dict.fromkeys(stored.keys(), stored)
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def __call__(self, name: str) -> Any:
        import torch

        return self._by_name[name].get_tensor(name).to(torch.float32).numpy()


def _turn(weight: Any, heads: int) -> Any:
    """Rows (or a bias) of queries or keys in llama.cpp's order."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


class Recipe:
    """How each tensor is stored in a file of `kind`. The mixes of K-quants are those of llama-quantize."""

    def __init__(self, checkpoint: Checkpoint, kind: str):
        self.kind, self.tied = kind, checkpoint.tied
        self.base = kind.removesuffix("_m")
        self.layers = 1 + max(
            (int(n[1]) for t in checkpoint.tensors if (n := _LAYER.search(t.name))), default=0
        )

    def stored(self, name: str, shape: tuple[int, ...]) -> str:
        """ggml's type of a tensor, in lower case."""
        if len(shape) < 2:
            return "f32"
        if shape[-1] % _BLOCK:
            return "f16"
        if not self.base.endswith("_k"):
            return "q8_0" if TYPES[self.kind] < 8 and _VOCABULARY.search(name) else self.kind
        kind = "q6_k" if self._has_more_bits(name) else self.base
        return kind if shape[-1] % _LARGE_BLOCK == 0 else _SMALLER[kind]

    def bits(self, name: str, shape: tuple[int, ...]) -> float:
        """Per value, with the scales."""
        return _BITS[self.stored(name, shape)]

    def _has_more_bits(self, name: str) -> bool:
        """The head, and in a mix (…_m) the values and down projections of about half of the layers."""
        if _VOCABULARY.search(name):
            return self.tied or "lm_head" in name
        found = _LAYER.search(name)
        if not found or not self.kind.endswith("_m") or not re.search(r"v_proj|down_proj", name):
            return False
        layer, eighth = int(found[1]), self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
