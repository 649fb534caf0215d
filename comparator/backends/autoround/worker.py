"""Run as a process: the auto-round package quantizes a checkpoint and writes it. `recipe.Recipe.make` is the other end.

The algorithm (Cheng et al. 2023, arXiv:2309.05516), the packing and the file are auto-round's own. Time left comes from
hooks on the model's layers, which it runs once for each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comparator.backends.autoround.recipe import ADVICE
from comparator.backends.gptqmodel_layers import walk
from comparator.backends.gptqmodel_layers.time_left import TimeLeft
from comparator.util import processes

Progress = Callable[[float | None, str], None]

_BATCH = 8  # samples a step, auto-round's own default
_STEP = (
    6  # how many times as long as a forward pass one step takes: forward, backward, and rounding every weight
)


def main(request: dict[str, Any], progress: Progress) -> None:
    progress(0.0, "starting torch and auto-round")
    import torch
    from transformers import AutoTokenizer

    from comparator.backends.base import Placement
    from comparator.backends.transformers_loader import from_pretrained
    from comparator.sources import open_checkpoint

    samples = request["samples"]
    model = from_pretrained(
        open_checkpoint(request["model"]),
        Placement("cpu"),
        lambda _, message: progress(0.0, message),
        dtype=request["dtype"],
    )
    tokenizer = AutoTokenizer.from_pretrained(
        request["model"], local_files_only=True, trust_remote_code=False
    )
    if request["iters"]:
        _watch(model, samples, request["iters"], request["device"], progress)
    data = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        for ids in samples
    ]
    from auto_round import AutoRound

    rounding = AutoRound(
        model, tokenizer, alg_configs=_algorithm(request), format="auto_round", dataset=data, seqlen=len(samples[0]),
        nsamples=len(samples), batch_size=_BATCH, device_map=request["device"], enable_torch_compile=False,
        low_gpu_mem_usage=True, low_cpu_mem_usage=False, trust_remote_code=False,
    )  # fmt: skip
    rounding.quantize()
    progress(1.0, "writing the quantized checkpoint")
    rounding.save_quantized(request["target"], inplace=True)


def _algorithm(request: dict[str, Any]) -> Any:
    from auto_round import RTNConfig, SignRoundConfig

    weights = {name: request[name] for name in ("bits", "group_size", "sym")}
    if not request["iters"]:
        return RTNConfig(disable_opt_rtn=True, **weights)
    return SignRoundConfig(iters=request["iters"], **weights)


def _watch(model: Any, samples: list[list[int]], iters: int, device: str, progress: Progress) -> None:
    """Report the share that is done, and the time left, whenever a layer of the model runs."""
    import torch

    blocks = walk.find_blocks(model)
    batches = -(-len(samples) // _BATCH)
    each = 2 * batches + _STEP * iters  # both outputs of a layer are kept, before and after
    timer = TimeLeft(each * len(blocks), progress, len(blocks))
    with torch.no_grad():
        inputs, extra = walk.first_inputs(model, blocks[0], samples[:_BATCH], device)
        blocks[0].to(device)
        timer.guess(walk.seconds_of_a_pass(blocks[0], inputs, extra), 0.0)
        blocks[0].to("cpu")
    entered = set()

    def watch(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if number not in entered:
                entered.add(number)
                timer.done = number * each
                timer.enter(number)
            timer.report()
            more = _STEP if torch.is_grad_enabled() else 1
            timer.done = min(timer.done + more, (number + 1) * each)

        return hook

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(watch(number))


if __name__ == "__main__":
    processes.report(main, ADVICE)
