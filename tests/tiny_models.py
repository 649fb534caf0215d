"""Tiny models with random weights and a real tokenizer, saved as transformers saves them. Seconds, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 320
_TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? Paris.",
    "1 2 3 4 5 6 7 8 9",
]
_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def tokenizer(chat: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = _TEMPLATE
    return fast


def config(name: str, **changes: Any) -> Any:
    """A config of family `name` with two small layers: llama, mistral, qwen2, gemma, phi, opt, bloom, gpt2, …"""
    import transformers

    rope = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    tables = {
        "llama": ("LlamaConfig", rope),
        "mistral": ("MistralConfig", rope),
        "qwen2": ("Qwen2Config", rope),
        "qwen3": ("Qwen3Config", {**rope, "head_dim": 8}),
        "gemma": ("GemmaConfig", {**rope, "head_dim": 8}),
        "phi": ("PhiConfig", rope),
        "opt": (
            "OPTConfig",
            {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
        ),
        "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        "gpt_neox": (
            "GPTNeoXConfig",
            {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 128},
        ),
        "mixtral": ("MixtralConfig", {**rope, "intermediate_size": 256, "num_local_experts": 4}),
        "gpt_oss": (
            "GptOssConfig",
            {**rope, "hidden_size": 64, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
             "sliding_window": 16},
        ),
        "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    }  # fmt: skip
    kind, values = tables[name]
    return getattr(transformers, kind)(
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **values, **changes}
    )


def save_config(folder: Path, model_type: str, values: dict[str, Any]) -> None:
    """A model of this config with its tokenizer, for families that `config` does not know."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save(
    folder: Path, name: str = "llama", *, chat: bool = False, dtype: str = "float32", **changes: Any
) -> Any:
    """Make a model of that family, save it with its tokenizer, and return it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    shard = changes.pop("max_shard_size", None)
    model = AutoModelForCausalLM.from_config(config(name, **changes)).to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer(chat).save_pretrained(folder)
    return model


def cut(source: Path, target: Path, layers: int = 2) -> Path:
    """The first `layers` layers of the checkpoint in `source`, as a checkpoint in `target`; the rest is as it was."""
    import json
    import re
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                layer = re.match(r"model\.layers\.(\d+)\.", name)
                if layer is None or int(layer[1]) < layers:
                    tensors[name] = weights.get_tensor(name)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix not in (".safetensors",) and not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    config = json.loads((target / "config.json").read_text())
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    (target / "config.json").write_text(json.dumps(config))
    return target


def cut_adapter(source: Path, target: Path, layers: int = 2) -> Path:
    """The part of the adapter in `source` that is for the first `layers` layers, as an adapter in `target`."""
    import re
    import shutil

    from safetensors.torch import load_file, save_file

    def is_kept(name: str) -> bool:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        return layer is None or int(layer[1]) < layers

    tensors = load_file(source / "adapter_model.safetensors")
    target.mkdir(parents=True)
    shutil.copy(source / "adapter_config.json", target)
    save_file({k: v for k, v in tensors.items() if is_kept(k)}, target / "adapter_model.safetensors")
    return target


def unique_parameters(model: Any) -> int:
    """Each storage once: what a tied head shares does not count twice."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
