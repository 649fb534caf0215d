"""DoRA needs the norm of every column of weight + update; it is the same at every step, so it is taken once.

peft unpacks the whole weight for it at every forward, and on a CPU it unpacks bitsandbytes' repacked 4-bit weights
as if they were not repacked, which gives wrong norms. Here the norm comes from the backend that knows the packing;
the arithmetic after it is peft's own (peft.tuners.lora.dora, section 4.3 of https://huggingface.co/papers/2402.09353).
"""

from __future__ import annotations

import types
from typing import Any

from comparator.backends.base import Backend


def cache_norms(model: Any, backend: Backend) -> None:
    """Let every DoRA layer of linear modules in `model` take its norm once per strength and dtype."""
    from peft.tuners.lora.dora import DoraLinearLayer

    for module in model.modules():
        vectors = getattr(module, "lora_magnitude_vector", None)
        if not vectors:
            continue
        for layer in vectors.values():
            if type(layer) is DoraLinearLayer:
                layer._comparator_norms = {}
                layer.forward = types.MethodType(_forward(backend), layer)


def _forward(backend: Backend):
    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"):
        import torch.nn.functional as F
        from peft.utils.other import transpose

        key = (float(scaling), x.dtype)
        norm = self._comparator_norms.get(key)
        if norm is None or base_result is None:
            weight = plain_weight(base_layer, backend).to(x.dtype)
            update = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name).to(x.dtype)
            norm = self.get_weight_norm(weight=weight, lora_weight=update, scaling=scaling).detach()
            self._comparator_norms[key] = norm
        scale = (self.weight / norm).view(1, -1)
        result = lora_B(lora_A(x))
        if base_result is None:
            base_result = F.linear(x, transpose(weight, self.fan_in_fan_out))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (scale - 1) * base_result + scale * result * scaling

    return forward


def plain_weight(module: Any, backend: Backend) -> Any:
    """The weight that a module multiplies with, unpacked; where the library's own way is right, by that."""
    kind = type(module.weight).__name__
    if kind == "Params4bit":
        state = module.weight.quant_state
        if not getattr(state, "packing_format_for_cpu", False):
            import bitsandbytes as bnb

            return bnb.functional.dequantize_4bit(module.weight.data, state)
        return backend.dequantize(module)
    if kind == "Int8Params":
        import bitsandbytes as bnb

        scales = backend.quant_state(module)["SCB"]
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
    return module.weight
