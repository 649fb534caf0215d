"""Quantizes a model's linear layers with GPTQ, block by block, and writes a checkpoint that transformers loads.

The algorithm (Frantar et al. 2022, arXiv:2210.17323) and the packed format are gptqmodel's; the walk over the
model is ours, so that progress is reported after every layer, Stop is honoured between two of them, and only one
transformer block at a time has to fit beside the model.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comparator.backends.gptq.layer import Linear, Recipe, solve, solver_for
from comparator.backends.gptq.time_left import TimeLeft
from comparator.core.errors import UserError

Progress = Callable[[float | None, str], None]


class _Captured(Exception):
    """Ends a forward pass once what was looked for has been seen."""


def quantize(
    model: Any,
    samples: list[list[int]],
    recipe: Recipe,
    target: Path,
    tokenizer: Any,
    progress: Progress,
    device: str = "cpu",
) -> None:
    """Quantize `model` (on the CPU) in place and write it to the folder `target`.

    `samples`: token ids, one list a sample. `device`: where the blocks run, one at a time. `progress(fraction,
    message)` is called before every layer and may raise to stop. Raises `Problem` for a model without layers that
    GPTQ takes. The model is useless afterwards.
    """
    import torch

    blocks = find_blocks(model)
    plan = [linears(block, recipe) for block in blocks]
    work = sum(_work(layer) for block in plan for layer in block)
    if not work:
        raise UserError(
            f"{type(model).__name__} has no linear layer that GPTQ can take with {recipe.bits} bits and group size "
            f"{recipe.group_size}.",
            "Choose another group size, or nf4.",
        )
    timer = TimeLeft(work, progress, len(blocks))
    model.config.use_cache = False
    with torch.no_grad(), _without_compiling():
        inputs, extra = _first_inputs(model, blocks[0], samples, device)
        packed: list[dict[str, Any]] = []
        for number, block in enumerate(blocks):
            block.to(device)
            if number == 0:
                timer.guess(
                    _seconds_a_unit(plan, recipe, device), _seconds_of_passes(block, plan, inputs, extra)
                )
            timer.enter(number)
            done = _quantize_block(block, plan[number], inputs, extra, recipe, timer)
            packed.append({layer.name: module for layer, module in done})
            inputs = [_run(block, hidden, kwargs) for hidden, kwargs in zip(inputs, extra, strict=True)]
            block.to("cpu")
            gc.collect()
    model.config.use_cache = True
    progress(1.0, "writing the quantized checkpoint")
    _save(model, plan, blocks, packed, recipe, target, tokenizer)


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Inside, gptqmodel does not compile its CUDA version of the column loop, which it otherwise does unasked."""
    name = "GPTQMODEL_DISABLE_GPTQ_CUDA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


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


def linears(block: Any, recipe: Recipe) -> list[Linear]:
    """The layers of a block that can be packed: sizes in 32s (a packed word holds up to 16 values), and inputs
    that the group size divides."""
    found = []
    for name, module in block.named_modules():
        sizes = linear_sizes(module)
        if sizes is None:
            continue
        inputs, outputs = sizes
        group = recipe.group_size if recipe.group_size > 0 else inputs
        if inputs % 32 == 0 and outputs % 32 == 0 and inputs % group == 0:
            found.append(Linear(name, module, inputs, outputs))
    return found


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """(input features, output features) of an unquantized linear layer."""
    import torch

    return (module.in_features, module.out_features) if type(module) is torch.nn.Linear else None


def _work(layer: Linear) -> float:
    """Relative cost: one step per column, each over all rows, plus a constant per column."""
    return layer.inputs * (layer.outputs + 300)


def _seconds_a_unit(plan: list[list[Linear]], recipe: Recipe, device: str) -> float:
    """Seconds per unit of `_work`, from a small layer of random numbers, so that the time can be told beforehand."""
    import torch

    outputs = max(layer.outputs for block in plan for layer in block)
    inputs = max(128, recipe.group_size)
    trial = Linear("trial", torch.nn.Linear(inputs, outputs, bias=False, device=device), inputs, outputs)
    times_s = []
    for _ in range(2):  # the first one meets cold code
        solver = solver_for(trial, recipe)
        sample = torch.randn(1, 2 * inputs, inputs, device=device)
        solver.add_batch(sample, trial.module(sample))
        start = time.perf_counter()
        solver.quantize()
        _wait_for(device)
        times_s.append(time.perf_counter() - start)
    return min(times_s) / _work(trial)


def _seconds_of_passes(block: Any, plan: list[list[Linear]], inputs: list[Any], extra: list[dict]) -> float:
    """Seconds of all passes over the samples, from one pass of one sample. About five a block: four groups of
    layers that share their input, and one for what leaves the block."""
    times_s = []
    for _ in range(2):
        start = time.perf_counter()
        _run(block, inputs[0], extra[0])
        _wait_for(str(inputs[0].device))
        times_s.append(time.perf_counter() - start)
    return min(times_s) * len(inputs) * 5 * len(plan)


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- running one block at a time


def _first_inputs(
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
        extra.append(_moved(kwargs, device))
        raise _Captured

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for ids in samples:
            try:
                model(input_ids=torch.tensor([ids]), use_cache=False)
            except _Captured:
                pass
    finally:
        handle.remove()
    return inputs, extra


def _moved(value: Any, device: str) -> Any:
    """The same with every tensor in it on `device`."""
    if hasattr(value, "to") and hasattr(value, "dtype"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value


def _run(block: Any, hidden: Any, kwargs: dict) -> Any:
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _quantize_block(
    block: Any, layers: list[Linear], inputs: list[Any], extra: list[dict], recipe: Recipe, timer: TimeLeft
) -> Iterator[tuple[Linear, Any]]:
    """Yield (layer, packed module) for each layer of the block, in the order in which the block uses them.

    Layers that read the same tensor (query, key, value) share one pass over the samples. A later one sees what
    the quantized earlier ones give it ("true sequential").
    """
    for together in _in_order(block, layers, inputs[0], extra[0]):
        solvers = {layer.name: solver_for(layer, recipe) for layer in together}
        with _watching(together, solvers, last=together[-1].name):
            for hidden, kwargs in zip(inputs, extra, strict=True):
                timer.report()
                try:
                    _run(block, hidden, kwargs)
                except _Captured:
                    pass
        for layer in together:
            timer.report()
            yield layer, solve(layer, solvers.pop(layer.name), recipe)
            timer.finished(_work(layer))


def _in_order(block: Any, layers: list[Linear], hidden: Any, kwargs: dict) -> list[list[Linear]]:
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
        _run(block, hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return order + [[layer] for layer in layers if layer.name not in seen]


@contextmanager
def _watching(together: list[Linear], solvers: dict[str, Any], last: str) -> Iterator[None]:
    """Inside, what enters these layers goes to their solvers, and a pass ends after the last of them."""

    def hook(name):
        def seen(_module, args, output):
            solvers[name].add_batch(args[0].detach(), output.detach())
            if name == last:
                raise _Captured

        return seen

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in together]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- the checkpoint


def _save(
    model, plan: list[list[Linear]], blocks, packed: list[dict], recipe: Recipe, target: Path, tokenizer
) -> None:
    import torch

    left_out = False
    for block, layers, modules in zip(blocks, plan, packed, strict=True):
        names = {layer.name for layer in layers}
        left_out |= any(linear_sizes(m) is not None and n not in names for n, m in block.named_modules())
        for name, module in modules.items():
            parent, _, own = name.rpartition(".")
            setattr(block.get_submodule(parent) if parent else block, own, module)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float16:
            tensor.data = tensor.data.to(
                torch.float16
            )  # as GPTQ checkpoints are: their scales are 16-bit floats
    kept = [[name] for name in dict.fromkeys(layer.name for layers in plan for layer in layers)]
    model.config.dtype = torch.float16
    model.config.quantization_config = recipe.config(left_out, kept)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
