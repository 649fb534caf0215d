"""Where bitsandbytes or transformers' loading of it needs help: slow paths, shapes that a kernel refuses, the CPU's packing.

Written for bitsandbytes 0.50, and for its integration in transformers 5.23.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

WRITTEN_FOR = "0.50"


@contextlib.contextmanager
def int8_on_device() -> Iterator[None]:
    """Inside, LLM.int8 weights are quantized where they are.

    transformers has each weight on the GPU, copies it to the CPU and back, because bitsandbytes quantizes on the way
    from one to the other: 18 s instead of 5 for 8 billion parameters. The arithmetic is the same call either way.
    """
    import bitsandbytes as bnb
    from transformers.integrations import bitsandbytes as integration
    from transformers.quantizers.quantizers_utils import get_module_from_name

    operation = integration.Bnb8bitQuantize
    before = operation.convert

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        values = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        if any(v.device.type != "cuda" for v in values.values()):
            return before(self, input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        result = {}
        for name, value in values.items():
            module, _ = get_module_from_name(model, name)
            if module.source_cls.__name__ == "Conv1D":  # GPT-2's linear layer, stored the other way round
                value = value.T
            attributes = model.get_parameter_or_buffer(name).__dict__
            attributes.pop("SCB", None)
            result[name] = bnb.nn.Int8Params(value, requires_grad=False, **attributes)._quantize(value.device)
        return result

    operation.convert = convert
    try:
        yield
    finally:
        operation.convert = before


@contextlib.contextmanager
def keeping_packed(model: Any) -> Iterator[None]:
    """Inside, `state_dict()` leaves the CPU's packed format as it is.

    bitsandbytes unpacks it for that, in the live weights: double quantization would be made again with other numbers at
    the next forward.
    """
    states = [
        s
        for m in model.modules()
        if (s := getattr(getattr(m, "weight", None), "quant_state", None)) is not None
        and getattr(s, "packing_format_for_cpu", False)
    ]
    for state in states:
        state.packing_format_for_cpu = False
    try:
        yield
    finally:
        for state in states:
            state.packing_format_for_cpu = True


def own_packed(model: Any) -> None:
    """Copy packed weights and their scales out of the file that they are mapped from on a CPU, so that loading has read
    them and the file can go."""

    def own(tensor: Any) -> Any:
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            weight.data = own(weight.data)
            for part in filter(None, (state, getattr(state, "state2", None))):
                part.absmax, part.code = own(part.absmax), own(part.code)
        elif getattr(weight, "SCB", None) is not None:
            weight.data = own(weight.data)
            weight.CB, weight.SCB = weight.data, own(weight.SCB)


def without_state(model: Any) -> list[str]:
    """Names of layers that were to be quantized and got a weight without scales, which is not the layer's own."""
    import bitsandbytes as bnb

    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, bnb.nn.Linear4bit) and getattr(module.weight, "quant_state", None) is None)
        or (isinstance(module, bnb.nn.Linear8bitLt) and getattr(module.weight, "SCB", None) is None)
    ]


def repacks_for_cpu(outputs: int, inputs: int, block: int) -> bool:
    """Whether a 4-bit weight (outputs, inputs) is repacked at its first forward on this CPU: see `leave_unsupported_layers`."""
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16() and outputs % 32 == 0 and inputs % max(64, block) == 0


def leave_unsupported_layers(model: Any) -> list[str]:
    """Keep bitsandbytes' packed CPU kernel away from shapes it refuses; returns notes for the column.

    The AVX-512 kernel wants output features in blocks of 32 and input features in blocks of 64; anything else
    fails at the first forward ("N must be divisible by block_n"). Such a layer stays quantized and takes
    bitsandbytes' general CPU path.
    """
    import bitsandbytes as bnb

    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
        and getattr(module, "support_avx512bf16_for_cpu", False)
        and module.weight.device.type == "cpu"
        and not repacks_for_cpu(module.out_features, module.in_features, module.weight.blocksize)
    ]
    for name in odd:
        model.get_submodule(name).support_avx512bf16_for_cpu = False
    if not odd:
        return []
    return [
        f"{len(odd)} layer(s) whose shape the packed AVX-512 kernel refuses ({odd[0]}"
        f"{' …' if len(odd) > 1 else ''}) run on bitsandbytes' general CPU path; they are 4-bit all the same."
    ]


def unpack_avx512(packed: Any, state: Any) -> Any:
    """Undo bitsandbytes' AVX-512 packing on a copy: (N, K/2) bytes of blocks of 32 rows → float32 (N, K).

    The layout is the one bitsandbytes writes at the first forward on such a CPU: within a block of 32 rows,
    byte j of a column pair holds row j in its low half and row j + 32 of the flattened pair in its high half.
    """
    import torch

    n, half = packed.shape
    rows = packed.reshape(-1, 32)
    values = torch.cat([rows & 0xF, rows >> 4], dim=1)
    values = values.reshape(n // 32, half, 32, 2).transpose(1, 2).reshape(n, half * 2)
    absmax = state.absmax.T.to(torch.float32).repeat_interleave(state.blocksize, dim=1)
    return state.code.to(torch.float32)[values.long()] * absmax
