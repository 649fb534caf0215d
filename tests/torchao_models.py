"""torchao's test material: schemes that run on a CPU, and models that plain transformers quantizes."""

from __future__ import annotations

from pathlib import Path

from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.backends.torchao.schemes import BY_NAME, config

AO = backend_for(resolve("torchao"))
PROMPT = "The capital of France is"
NEW = 4
CPU = Placement("cpu")
# scheme, group that loads without the option, logical dtype, compute dtype, classes of weights
ON_CPU = {
    "torchao": ("int8", "row", "int8 (torchao)", "bf16"),
    "torchao:group=64": ("int8", "64", "int8 (torchao)", "bf16"),
    "torchao:scheme=int8dyn": ("int8dyn", "row", "int8 (torchao)", "int8"),
    "torchao:group=64,scheme=intx4": ("intx4", "64", "intx4 (torchao)", "bf16"),
    "torchao:scheme=fp8": ("fp8", "row", "fp8 (torchao)", "bf16"),
    "torchao:group=tensor,scheme=fp8": ("fp8", "tensor", "fp8 (torchao)", "bf16"),
}


def plain(folder: Path, scheme: str, group: str, dtype: str = "bfloat16"):
    """The model as transformers alone loads it with torchao's config."""
    import torch
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = TorchAoConfig(config(BY_NAME[scheme], group))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map={"": "cpu"}, quantization_config=quantization
    ).eval()


def generated(model, ids: tuple[int, ...]) -> tuple[int, ...]:
    import torch

    given = torch.tensor([ids])
    out = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False
    )
    return tuple(out[0].tolist())[len(ids) :]


def quantized(model) -> dict:
    """Name → torchao tensor."""
    return {n: p for n, p in model.named_parameters() if type(p).__module__.startswith("torchao")}
