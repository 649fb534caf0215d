"""Quantizes a model's linear layers with AWQ, block by block, and writes a checkpoint that transformers loads.

AWQ (Lin et al. 2023, arXiv:2306.00978) multiplies the columns of a weight that meet large activations before it is
rounded, and divides what comes before by the same, so that the product stays and rounding costs less where it matters. What
comes before is found by trying it: a norm or a linear layer is scaled when the block's output then is what it was. That
takes no table of architectures. Where nothing fits, a layer is clipped and rounded without scales.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparator.backends.awq.layer import Activations, Recipe, best_scale, clipped, packed, rounded
from comparator.backends.gptqmodel_layers.time_left import TimeLeft
from comparator.backends.gptqmodel_layers.walk import (
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

_ROWS = 512  # activations that the search multiplies with; the mean is of all
_SEARCH = 0.8  # of a layer's time; the rest is clipping and rounding
# The products of queries and keys are too sensitive for it, as AWQ's own code has it.
_NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")


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
    message)` is called before every layer and may raise to stop. Raises `UserError` for a model without layers that AWQ
    takes. The model is useless afterwards.
    """
    import torch

    blocks = find_blocks(model)
    plan = [linears(block, recipe.group_size) for block in blocks]
    work = sum(_work(layer) for block in plan for layer in block)
    if not work:
        raise UserError(
            f"{type(model).__name__} has no linear layer that AWQ can quantize with group size {recipe.group_size}.",
            "Choose another group size, or nf4.",
        )
    timer = TimeLeft(work, progress, len(blocks))
    model.config.use_cache = False
    with torch.no_grad():
        inputs, extra = first_inputs(model, blocks[0], samples, device)
        inputs, extra = [x.float() for x in inputs], _in_float32(extra)
        for number, block in enumerate(blocks):
            block.to(device, torch.float32)
            if number == 0:
                passes_s = 2 * len(blocks) * seconds_of_a_pass(block, inputs, extra)
                timer.guess(_seconds_a_unit(recipe, device), passes_s)
            timer.enter(number)
            done = _quantize_block(block, plan[number], inputs, extra, recipe, timer)
            inputs = [run(block, hidden, kwargs) for hidden, kwargs in zip(inputs, extra, strict=True)]
            put_in_place([block], [done])
            block.to("cpu")
            gc.collect()
    model.config.use_cache = True
    progress(1.0, "writing the quantized checkpoint")
    _save(model, recipe, target, tokenizer)


def _save(model: Any, recipe: Recipe, target: Path, tokenizer: Any) -> None:
    from transformers.integrations import replace_quantization_scales

    head = model.get_output_embeddings()
    kept = [name for name, m in model.named_modules() if linear_sizes(m) is not None and m is not head]
    # In some architectures transformers expects a scale behind the activation function; it is one here.
    replace_quantization_scales(model, model.config.model_type)
    save(model, recipe.config(kept), target, tokenizer)


def _in_float32(value: Any) -> Any:
    """The same with every floating-point tensor in it as float32."""
    if hasattr(value, "is_floating_point"):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(item) for key, item in value.items()}
    return type(value)(_in_float32(item) for item in value) if type(value) in (list, tuple) else value


def _work(layer: Linear) -> float:
    """Relative cost: all of it is products of the weights' size."""
    return layer.inputs * layer.outputs


def _seconds_a_unit(recipe: Recipe, device: str) -> float:
    """Seconds per unit of `_work`, from a small layer of random numbers, so that the time can be told beforehand."""
    import torch

    size = max(256, recipe.group_size)
    rows, weight = torch.randn(_ROWS, size, device=device), torch.randn(size, size, device=device)
    seen, times_s = Activations(rows.abs().mean(0), rows), []
    for _ in range(2):  # the first one meets cold code
        start = time.perf_counter()
        best_scale([weight], seen, recipe, lambda: None)
        rounded(clipped(weight, rows, recipe, lambda: None), recipe)
        wait_for(device)
        times_s.append(time.perf_counter() - start)
    return min(times_s) / size**2


def _quantize_block(
    block: Any, layers: list[Linear], inputs: list[Any], extra: list[dict], recipe: Recipe, timer: TimeLeft
) -> dict[str, Any]:
    """The packed layers by name. The block is left with the rounded weights in their place."""
    groups = in_order(block, layers, inputs[0], extra[0])
    seen = _activations(block, groups, inputs, extra, timer)
    for group in groups:
        if (activations := seen.get(group[0].name)) is not None:
            _scale(block, group, activations, inputs[0], extra[0], recipe, timer)
        timer.finished(_SEARCH * sum(map(_work, group)))
    done: dict[str, Any] = {}
    for group in groups:
        activations = seen.get(group[0].name)
        for layer in group:
            timer.report()
            weight = layer.module.weight.data
            if activations is not None and not any(part in layer.name for part in _NOT_CLIPPED):
                weight = clipped(weight, activations.rows, recipe, timer.report)
            values = rounded(weight, recipe)
            layer.module.weight.data = values.weight
            done[layer.name] = packed(layer, values, recipe)
            timer.finished((1 - _SEARCH) * _work(layer))
    return done


def _activations(
    block: Any, groups: list[list[Linear]], inputs: list[Any], extra: list[dict], timer: TimeLeft
) -> dict[str, Activations]:
    """What enters the first layer of each group, by its name; without those that no sample reaches.

    Each token's activations are divided by the square root of their root mean square. Those of the first token can be a
    thousand times larger than the others': squared, they alone would decide the scales, though the next norm divides by
    them. Where all tokens count the same, the first one, which later ones attend to most, is rounded too coarsely.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    sums: dict[str, list[Any]] = {}
    each = max(1, -(-_ROWS // len(inputs)))

    def watch(name: str) -> Callable[[Any, tuple], None]:
        def hook(_module: Any, args: tuple) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            if not len(rows):
                return
            rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6).sqrt()
            total, count, some = sums.get(name, (0.0, 0, []))
            some.append(rows[torch.randperm(len(rows), generator=generator)[:each].to(rows.device)])
            sums[name] = [total + rows.abs().sum(0), count + len(rows), some]

        return hook

    handles = [group[0].module.register_forward_pre_hook(watch(group[0].name)) for group in groups]
    try:
        for hidden, kwargs in zip(inputs, extra, strict=True):
            timer.report()
            run(block, hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Activations(total / count, torch.cat(some)) for name, (total, count, some) in sums.items()}


# ---------------------------------------------------------------- scaling a layer and what comes before it


def _scale(
    block: Any,
    group: list[Linear],
    seen: Activations,
    hidden: Any,
    kwargs: dict,
    recipe: Recipe,
    timer: TimeLeft,
) -> None:
    """Scale the columns of the group, what comes before it, and the activations with them; nothing where it does not pay."""
    divide = _what_comes_before(block, group, hidden, kwargs)
    if divide is None:
        return
    weights = [layer.module.weight.data for layer in group]
    if (scale := best_scale(weights, seen, recipe, timer.report)) is None:
        return
    divide(scale)
    for weight in weights:
        weight.mul_(scale)
    seen.mean, seen.rows = seen.mean / scale, seen.rows / scale


def _what_comes_before(
    block: Any, group: list[Linear], hidden: Any, kwargs: dict
) -> Callable[[Any], None] | None:
    """A function that divides the group's input by a scale (inputs,), by changing the weights of another module; None
    where there is no such module.

    Tried on one sample: with random factors, and the group's columns multiplied by them, the block has to give the same
    output; with the other module's change alone it must not.
    """
    import torch

    size, own = group[0].inputs, {id(layer.module) for layer in group}
    before = run(block, hidden, kwargs)
    factors = torch.linspace(0.5, 2, size, device=before.device)[torch.arange(size).mul(7919).remainder(size)]
    columns = [layer.module.weight for layer in group]
    for module in (m for m in block.modules() if id(m) not in own):
        for divide in _ways(module, size):
            changed = [*columns, *module.parameters(recurse=False)]
            kept = [p.data for p in changed]
            for weight in columns:
                weight.data = weight.data * factors
            divide(factors)
            same = _near(run(block, hidden, kwargs), before)
            for weight, data in zip(columns, kept, strict=False):
                weight.data = data
            fits = same and not _near(run(block, hidden, kwargs), before)
            for parameter, data in zip(changed, kept, strict=True):
                parameter.data = data
            if fits:
                return divide
    return None


def _ways(module: Any, size: int) -> list[Callable[[Any], None]]:
    """How the `size` outputs of a module could be divided: a norm's weight and bias (Gemma multiplies by 1 + weight), or
    the rows of a linear layer."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None or not hasattr(weight, "data") or weight.shape[0] != size or weight.dim() > 2:
        return []
    if weight.dim() == 2 and linear_sizes(module) is None:
        return []

    def divide(scale: Any, shift: float = 0.0) -> None:
        module.weight.data = (module.weight.data + shift) / (
            scale if weight.dim() == 1 else scale[:, None]
        ) - shift
        if bias is not None:
            module.bias.data = module.bias.data / scale

    return [divide] if weight.dim() == 2 else [divide, lambda scale: divide(scale, 1.0)]


def _near(one: Any, other: Any) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())
