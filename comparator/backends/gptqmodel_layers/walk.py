"""A full-precision model, block by block: what can be packed, in which order a block uses it, and the checkpoint of the
packed layers. One block at a time lies on the device beside the hidden states.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError


class Captured(Exception):
    """Ends a forward pass once what was looked for has been seen."""


@dataclass(frozen=True)
class Linear:
    """One quantizable layer of a block, by its name inside the block."""

    name: str
    module: Any
    inputs: int
    outputs: int


# ---------------------------------------------------------------- finding what to quantize


def find_blocks(model: Any) -> Any:
    """The list of transformer blocks, by the names under which transformers will look for it; else the longest
    list of modules. Raises `UserError` where there is none."""
    import torch
    from optimum.gptq.utils import get_block_name_with_pattern

    try:
        return model.get_submodule(get_block_name_with_pattern(model))
    except (ValueError, AttributeError):
        pass
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no stack of transformer blocks.", "Use nf4 or int8 for this model."
        )
    return max(lists, key=len)


def linears(block: Any, group_size: int) -> list[Linear]:
    """The layers of a block that can be packed: sizes in 32s (a packed word holds up to 16 values), and inputs
    that the group size divides."""
    found = []
    for name, module in block.named_modules():
        sizes = linear_sizes(module)
        if sizes is None:
            continue
        inputs, outputs = sizes
        group = group_size if group_size > 0 else inputs
        if inputs % 32 == 0 and outputs % 32 == 0 and inputs % group == 0:
            found.append(Linear(name, module, inputs, outputs))
    return found


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """(input features, output features) of an unquantized linear layer."""
    import torch

    return (module.in_features, module.out_features) if type(module) is torch.nn.Linear else None


# ---------------------------------------------------------------- running one block at a time


def first_inputs(
    model: Any, block: Any, samples: list[list[int]], device: str
) -> tuple[list[Any], list[dict]]:
    """Hidden states (1, tokens, width) that enter the first block, and the keyword arguments that go with them,
    both on `device`."""
    import torch

    inputs: list[Any] = []
    extra: list[dict] = []

    def catch(_module, args, kwargs):
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        inputs.append(hidden.detach().to(device))
        extra.append(moved(kwargs, device))
        raise Captured

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for ids in samples:
            try:
                model(input_ids=torch.tensor([ids]), use_cache=False)
            except Captured:
                pass
    finally:
        handle.remove()
    return inputs, extra


def moved(value: Any, device: str) -> Any:
    """The same with every tensor in it on `device`."""
    if hasattr(value, "to") and hasattr(value, "dtype"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if type(value) in (list, tuple) else value


def run(block: Any, hidden: Any, kwargs: dict) -> Any:
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def in_order(block: Any, layers: list[Linear], hidden: Any, kwargs: dict) -> list[list[Linear]]:
    """Groups of layers that read the same tensor, in the order of use. A layer that one sample does not reach
    (an expert) comes last, on its own."""
    by_name = {layer.name: layer for layer in layers}
    order: list[list[Linear]] = []
    seen: dict[str, Any] = {}

    def note(name):
        def hook(_module, args):
            if name in seen:
                return
            same = order and seen[order[-1][0].name] is args[0]
            seen[name] = args[0]
            if same:
                order[-1].append(by_name[name])
            else:
                order.append([by_name[name]])

        return hook

    handles = [layer.module.register_forward_pre_hook(note(layer.name)) for layer in layers]
    try:
        run(block, hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return order + [[layer] for layer in layers if layer.name not in seen]


# ---------------------------------------------------------------- time


def seconds_of_a_pass(block: Any, inputs: list[Any], extra: list[dict]) -> float:
    """Seconds of one pass over the samples through one block, from a pass of one sample."""
    times_s = []
    for _ in range(2):
        start = time.perf_counter()
        run(block, inputs[0], extra[0])
        wait_for(str(inputs[0].device))
        times_s.append(time.perf_counter() - start)
    return min(times_s) * len(inputs)


def wait_for(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- the checkpoint


def put_in_place(blocks: Any, packed: list[dict[str, Any]]) -> None:
    """Replace the layers of each block by the packed ones, by their names inside the block."""
    for block, modules in zip(blocks, packed, strict=True):
        for name, module in modules.items():
            parent, _, own = name.rpartition(".")
            setattr(block.get_submodule(parent) if parent else block, own, module)


def save(model: Any, config: dict[str, Any], target: Path, tokenizer: Any) -> None:
    """Write the model with its packed layers; what is not packed in fp16, as the scales are. `config`: what config.json
    says as its quantization_config."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float16:
            tensor.data = tensor.data.to(torch.float16)
    model.config.dtype = torch.float16
    model.config.quantization_config = config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
