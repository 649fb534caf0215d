"""Parts of peft that are replaced; written for peft 0.21."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

WRITTEN_FOR = "0.21"
ASKING = ("tuners.lora.gptq", "tuners.lora.awq", "utils.quantization_utils", "utils.other")


@contextlib.contextmanager
def without_gptqmodel() -> Iterator[None]:
    """Inside, peft takes gptqmodel for not installed. It asks about every module, and the answer imports gptqmodel, which
    takes seconds and sets environment variables of the process."""
    modules = [importlib.import_module(f"peft.{name}") for name in ASKING]
    before = [m.is_gptqmodel_available for m in modules]
    for module in modules:
        module.is_gptqmodel_available = lambda: False
    try:
        yield
    finally:
        for module, answer in zip(modules, before, strict=True):
            module.is_gptqmodel_available = answer


def cache_dora_norms(model: Any, dequantize: Callable[[Any], Any]) -> None:
    """Let every DoRA layer of linear modules in `model` take its norm once per strength and dtype.

    DoRA needs the norm of every column of weight + update; it is the same at every step. peft unpacks the whole weight
    for it at every forward, and on a CPU it unpacks bitsandbytes' repacked 4-bit weights as if they were not repacked,
    which gives wrong norms. The arithmetic after the norm is peft's own (peft.tuners.lora.dora, section 4.3 of
    https://huggingface.co/papers/2402.09353).

    Args:
        dequantize: A module → its weight (out, in), or None where the weight is not quantized (`Backend.dequantize`).
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    for module in model.modules():
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            if type(layer) is DoraLinearLayer:
                layer.forward = types.MethodType(_dora_forward(dequantize), layer)


def _dora_forward(dequantize: Callable[[Any], Any]) -> Callable:
    norms: dict[tuple[float, Any], Any] = {}

    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"):
        import torch.nn.functional as F
        from peft.utils.other import transpose

        key = (float(scaling), x.dtype)
        norm = norms.get(key)
        if norm is None or base_result is None:
            weight = dequantize(base_layer)
            weight = (base_layer.weight if weight is None else weight).to(x.dtype)
            update = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name).to(x.dtype)
            norm = self.get_weight_norm(weight=weight, lora_weight=update, scaling=scaling).detach()
            norms[key] = norm
        scale = (self.weight / norm).view(1, -1)
        result = lora_B(lora_A(x))
        if base_result is None:
            base_result = F.linear(x, transpose(weight, self.fan_in_fan_out))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (scale - 1) * base_result + scale * result * scaling

    return forward
