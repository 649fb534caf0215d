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

from comparator.backends.gptq.layer import Recipe, solve, solver_for
from comparator.backends.gptqmodel_layers.time_left import TimeLeft
from comparator.backends.gptqmodel_layers.walk import (
    Captured,
    Linear,
    find_blocks,
    first_inputs,
    in_order,
    linear_sizes,
    linears,
    put_in_place,
    run,
    save,
    seconds_of_a_pass,
    wait_for,
)
from comparator.core.errors import UserError

Progress = Callable[[float | None, str], None]


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
    plan = [linears(block, recipe.group_size) for block in blocks]
    work = sum(_work(layer) for block in plan for layer in block)
    if not work:
        raise UserError(
            f"{type(model).__name__} has no linear layer that GPTQ can quantize with {recipe.bits} bits and group size "
            f"{recipe.group_size}.",
            "Choose another group size, or nf4.",
        )
    timer = TimeLeft(work, progress, len(blocks))
    model.config.use_cache = False
    with torch.no_grad(), _without_compiling():
        inputs, extra = first_inputs(model, blocks[0], samples, device)
        packed: list[dict[str, Any]] = []
        for number, block in enumerate(blocks):
            block.to(device)
            if number == 0:
                timer.guess(
                    _seconds_a_unit(plan, recipe, device),
                    # Four groups of layers that share their input, and one pass for what leaves the block.
                    5 * len(blocks) * seconds_of_a_pass(block, inputs, extra),
                )
            timer.enter(number)
            done = _quantize_block(block, plan[number], inputs, extra, recipe, timer)
            packed.append({layer.name: module for layer, module in done})
            inputs = [run(block, hidden, kwargs) for hidden, kwargs in zip(inputs, extra, strict=True)]
            block.to("cpu")
            gc.collect()
    model.config.use_cache = True
    progress(1.0, "writing the quantized checkpoint")
    left_out = any(
        linear_sizes(module) is not None and name not in modules
        for block, modules in zip(blocks, packed, strict=True)
        for name, module in block.named_modules()
    )
    put_in_place(blocks, packed)
    kept = [[name] for name in dict.fromkeys(layer.name for layers in plan for layer in layers)]
    save(model, recipe.config(left_out, kept), target, tokenizer)


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
        wait_for(device)
        times_s.append(time.perf_counter() - start)
    return min(times_s) / _work(trial)


def _quantize_block(
    block: Any, layers: list[Linear], inputs: list[Any], extra: list[dict], recipe: Recipe, timer: TimeLeft
) -> Iterator[tuple[Linear, Any]]:
    """Yield (layer, packed module) for each layer of the block, in the order in which the block uses them.

    Layers that read the same tensor (query, key, value) share one pass over the samples. A later one sees what
    the quantized earlier ones give it ("true sequential").
    """
    for together in in_order(block, layers, inputs[0], extra[0]):
        solvers = {layer.name: solver_for(layer, recipe) for layer in together}
        with _watching(together, solvers, last=together[-1].name):
            for hidden, kwargs in zip(inputs, extra, strict=True):
                timer.report()
                try:
                    run(block, hidden, kwargs)
                except Captured:
                    pass
        for layer in together:
            timer.report()
            yield layer, solve(layer, solvers.pop(layer.name), recipe)
            timer.finished(_work(layer))


@contextmanager
def _watching(together: list[Linear], solvers: dict[str, Any], last: str) -> Iterator[None]:
    """Inside, what enters these layers goes to their solvers, and a pass ends after the last of them."""

    def hook(name):
        def seen(_module, args, output):
            solvers[name].add_batch(args[0].detach(), output.detach())
            if name == last:
                raise Captured

        return seen

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in together]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
