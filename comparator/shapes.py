"""Models of known shapes with random weights: speed needs no real ones. Written in seconds, to memory where it can.

Knows file formats (safetensors, GPTQ's packing, a tokenizer) and nothing of what loads them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from comparator.types import Problem

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "use_cache": True,
    "initializer_range": 0.02, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "llama-1b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-tiny": {
        **_LLAMA, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
GROUP = 128
_STD = 0.02


def shape(name: str) -> dict[str, Any]:
    if name not in SHAPES:
        raise Problem(f"There are no shapes called “{name}”.", f"The shapes are {', '.join(SHAPES)}.")
    return SHAPES[name]


def folder_for(name: str, gptq: bool) -> Path:
    """A new folder with room for it: in memory where the system offers that, else among the temporary files."""
    need = _bytes(shape(name)) * (1.4 if gptq else 1.05)
    memory = Path("/dev/shm")
    parent = (
        memory if memory.is_dir() and shutil.disk_usage(memory).free > need else Path(tempfile.gettempdir())
    )
    free = shutil.disk_usage(parent).free
    if free < need:
        raise Problem(
            f"{name} needs {need / 1e9:.0f} GB of temporary files and {free / 1e9:.0f} GB are free.",
            "Choose smaller shapes, or point TMPDIR at a larger disk.",
        )
    return Path(tempfile.mkdtemp(prefix="comparator-shapes-", dir=parent))


def write(folder: Path, name: str, *, gptq: bool = False, seed: int = 0) -> None:
    """Fill `folder` with config.json, safetensors shards and a tokenizer. `gptq`: the linear layers packed to 4 bits
    in groups of 128, as gptqmodel writes them, with weights of the same spread."""
    import torch
    from safetensors.torch import save_file

    config = dict(shape(name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.float16 if gptq else torch.bfloat16
    if gptq:
        config["torch_dtype"] = "float16"
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
            "checkpoint_format": "gptq", "lm_head": False,
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}

    def normal(*size: int) -> Any:
        return (torch.randn(size, generator=generator, device=device, dtype=torch.float32) * _STD).to(dtype)

    def linear(prefix: str, outputs: int, inputs: int) -> dict[str, Any]:
        return (
            _packed(prefix, outputs, inputs, generator)
            if gptq
            else {f"{prefix}.weight": normal(outputs, inputs)}
        )

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


def _packed(prefix: str, outputs: int, inputs: int, generator: Any) -> dict[str, Any]:
    """Random 4-bit values around zero point 8, scaled so that the weights spread as the unpacked ones do."""
    import torch

    device = generator.device
    qweight = torch.zeros((inputs // 8, outputs), dtype=torch.int32, device=device)
    for place in range(8):
        # 1 … 15: as many levels below the zero point as above. A mean that is not 0 would be multiplied up by
        # every layer until fp16 overflows.
        value = torch.randint(1, 16, qweight.shape, generator=generator, device=device, dtype=torch.int32)
        qweight |= value << (4 * place)
    level = _STD / (sum((v - 8) ** 2 for v in range(1, 16)) / 15) ** 0.5
    spread = 0.75 + 0.5 * torch.rand((inputs // GROUP, outputs), generator=generator, device=device)
    return {
        f"{prefix}.qweight": qweight,
        # The format `gptq` stores zero − 1: 7 in every half byte.
        f"{prefix}.qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        f"{prefix}.scales": (level * spread).to(torch.float16),
        f"{prefix}.g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


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
