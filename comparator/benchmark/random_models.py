"""Models of known shapes with random weights: speed needs no real ones. Written in seconds, to memory where it can."""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from comparator.backends.base import Backend
from comparator.core.errors import UserError

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "use_cache": True,
    "initializer_range": 0.02, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "llama-1b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-tiny": {
        **_LLAMA, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
_STD = 0.02


def shape(name: str) -> dict[str, Any]:
    if name not in SHAPES:
        raise UserError(f"There are no shapes called “{name}”.", f"The shapes are {', '.join(SHAPES)}.")
    return SHAPES[name]


def folder_for(name: str, packed: int = 0) -> Path:
    """A new folder with room for the model and `packed` quantized ones: in memory where the system offers that, else
    among the temporary files."""
    need = _bytes(shape(name)) * (1.05 + 0.35 * packed)
    memory = Path("/dev/shm")
    parent = (
        memory if memory.is_dir() and shutil.disk_usage(memory).free > need else Path(tempfile.gettempdir())
    )
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"{name} needs {need / 1e9:.0f} GB of temporary files and {free / 1e9:.0f} GB are free.",
            "Choose smaller shapes, or point TMPDIR at a larger disk.",
        )
    return Path(tempfile.mkdtemp(prefix="comparator-shapes-", dir=parent))


def write(folder: Path, name: str, *, backend: Backend | None = None, seed: int = 0) -> None:
    """Fill `folder` with config.json, safetensors shards and a tokenizer. `backend`: its method has quantized the
    linear layers, whose weights have the same spread."""
    import torch
    from safetensors.torch import save_file

    config = {**shape(name), **(backend.random_config if backend else {})}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}

    def normal(*size: int) -> Any:
        return (torch.randn(size, generator=generator, device=device, dtype=torch.float32) * _STD).to(dtype)

    def linear(prefix: str, outputs: int, inputs: int) -> dict[str, Any]:
        if backend is None:
            return {f"{prefix}.weight": normal(outputs, inputs)}
        packed = backend.random_layer(outputs, inputs, _STD, generator)
        return {f"{prefix}.{own}": tensor for own, tensor in packed.items()}

    writers = ThreadPoolExecutor(8)
    waiting: list[Future] = []

    def save(number: int, tensors: dict[str, Any]) -> None:
        file = f"model-{number:05d}.safetensors"
        index.update(dict.fromkeys(tensors, file))
        held = {k: v.cpu().contiguous() for k, v in tensors.items()}
        waiting.append(writers.submit(save_file, held, folder / file, metadata={"format": "pt"}))

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    ones = torch.ones(hidden, dtype=dtype)
    outside = {"model.embed_tokens.weight": normal(vocabulary, hidden), "model.norm.weight": ones}
    if not config["tie_word_embeddings"]:
        outside["lm_head.weight"] = normal(vocabulary, hidden)
    save(0, outside)
    for number in range(config["num_hidden_layers"]):
        at = f"model.layers.{number}"
        tensors = {
            f"{at}.input_layernorm.weight": ones,
            f"{at}.post_attention_layernorm.weight": ones.clone(),
        }
        for part, outputs, inputs in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", values, hidden),
            ("self_attn.v_proj", values, hidden), ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            tensors |= linear(f"{at}.{part}", outputs, inputs)
        save(number + 1, tensors)
    writers.shutdown()
    for future in waiting:
        future.result()
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    _tokenizer(vocabulary).save_pretrained(str(folder))
    if device == "cuda":
        torch.cuda.empty_cache()


def _tokenizer(vocabulary: int) -> Any:
    """Bytes as tokens, and a name for every id above them, so that any id the model makes can be shown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"«{i}»" for i in range(len(names), vocabulary)]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def _bytes(config: dict[str, Any]) -> int:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * values + 3 * hidden * inner
    return 2 * (layer * config["num_hidden_layers"] + 2 * config["vocab_size"] * hidden)
