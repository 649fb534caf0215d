"""A checkpoint in the layout that hqq writes and `ready_made` reads: packed weights, each layer's settings beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Tensors = dict[str, Any]


def write(model: Any, target: Path) -> None:
    """Write a model of `HQQLinear` layers whose weights are packed as hqq packs them. config.json says hqq."""
    from huggingface_hub import save_torch_state_dict

    from comparator.backends.hqq.layer import HQQLinear

    layers = {name: m for name, m in model.named_modules() if isinstance(m, HQQLinear)}
    tensors = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in layers}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _stored(layer).items()}
    save_torch_state_dict({n: t.contiguous() for n, t in tensors.items()}, target, max_shard_size="5GB")
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # a path of this machine
    kept = [n for n, m in model.named_modules() if hasattr(m, "weight") and n.endswith("lm_head")]
    settings = next(iter(layers.values())).quant_config["weight_quant_params"]
    config["quantization_config"] = {
        "quant_method": "hqq",
        "skip_modules": kept,
        "quant_config": {"weight_quant_params": settings},
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stored(layer: Any) -> Tensors:
    """The tensors of one layer, settings among them, encoded as hqq does."""
    from hqq.core.utils import encode_safetensor_type

    given = {"W_q": layer.W_q, **layer.meta, **layer.quant_config["weight_quant_params"]}
    if layer.bias is not None:
        given["bias"] = layer.bias
    flags = {"offload_meta": False, "encoded_state_dict": True, "stores_quant_config": True}
    return {name: encode_safetensor_type(value) for name, value in {**given, **flags}.items()}
