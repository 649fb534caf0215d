"""Our training beside trl's SFTTrainer used directly, with the same settings, in one process, in alternating pairs.

    python scripts/bench_train.py [--base nf4:dq] [--steps 12] [--pairs 3] [--batch-size 4] [--length 64]
    python scripts/bench_train.py --shapes llama-8b --base nf4:dq --rank 16 --length 1024 --batch-size 1 --pairs 2
    python scripts/bench_train.py --to-the-end            # the built-in model on `pirate`, through the job registry

A step's time runs from its beginning to the next one's, so that what is done between steps counts. Each side loads a
base of its own; the order of the two turns round from pair to pair; the ratio is the median of the pairs' ratios. Peaks
are CUDA's allocator's, above what was there before (on a CPU the process's). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def quiet(*_) -> None:
    pass


def samples(vocabulary: int, length: int, count: int):
    """Random ids, every token in the loss: speed needs no meaning."""
    from comparator.training.tokenize import Encoded

    draw = random.Random(0)
    rows = []
    for row in range(count):
        ids = tuple(draw.randrange(3, vocabulary) for _ in range(length))
        rows.append(Encoded(row + 1, ids, ids, length))
    return tuple(rows)


def clock(periods: list[float], device: str):
    """A callback that notes when steps begin; the same for both sides."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = None

        def on_step_begin(self, args, state, control, **_):
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            if self.began is not None:
                periods.append(now - self.began)
            self.began = now

    return Clock()


def direct(checkpoint, variant, request, rows, work, device):
    """SFTTrainer as its documentation has it: a prepared base, an SFTConfig, a LoraConfig."""
    from peft import prepare_model_for_kbit_training
    from trl import SFTTrainer

    from comparator.backends import backend_for
    from comparator.backends.base import Placement
    from comparator.training import targets
    from comparator.training.memory_estimate import checkpointing_for
    from comparator.training.tokenize import load_tokenizer
    from comparator.training.trainer import dataset, lora_config, sft_config

    variant, _ = backend_for(variant).training_variants(variant, device)[0]
    model = backend_for(variant).load(checkpoint, variant, Placement(device), quiet).model
    if variant.method not in ("fp32", "bf16", "fp16"):
        again = checkpointing_for(request.settings, device)
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=again, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return SFTTrainer(
        model,
        args=sft_config(request.settings, variant, work, device, False, request.settings.max_steps),
        train_dataset=dataset(rows),
        processing_class=load_tokenizer(checkpoint),
        peft_config=lora_config(
            request.settings,
            targets.select(request.settings, targets.in_model(model), checkpoint.source),
            checkpoint.source,
        ),
    )


def ours(checkpoint, variant, request, rows, work, device):
    """What a job runs."""
    from comparator.training import base_model
    from comparator.training.callbacks import Watch
    from comparator.training.memory_estimate import checkpointing_for
    from comparator.training.tokenize import load_tokenizer
    from comparator.training.trainer import make_trainer

    loaded = base_model.load(checkpoint, variant, device, checkpointing_for(request.settings, device), quiet)
    watch = Watch("bench", request, quiet, threading.Event(), device)
    tokenizer = load_tokenizer(checkpoint)
    return make_trainer(loaded, tokenizer, request, rows, (), work, device, watch, checkpoint.source)


def timed(make, checkpoint, variant, request, rows, device) -> dict:
    """One training; seconds a step without the first two, which compile and allocate."""
    import torch

    from comparator.metrics import memory
    from comparator.training.trainer import _release

    periods: list[float] = []
    work = Path(tempfile.mkdtemp(prefix="comparator-bench-"))
    try:
        with torch.enable_grad(), memory.track(device) as peak:
            began = time.perf_counter()
            trainer = make(checkpoint, variant, request, rows, work, device)
            load_s = time.perf_counter() - began
            trainer.add_callback(clock(periods, device))
            trainer.train()
        losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        _release(trainer)
        del trainer
        memory.give_back()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "step_s": statistics.median(periods[2:] or periods),
        "peak_bytes": peak.above_bytes,
        "losses": losses,
        "load_s": load_s,
    }


def bench(given) -> dict:
    from comparator.backends import backend_for, resolve
    from comparator.benchmark import random_models
    from comparator.metrics import memory
    from comparator.metrics.environment import read
    from comparator.sources import open_checkpoint
    from comparator.training.base_model import device as training_device
    from comparator.training.memory_estimate import estimate
    from comparator.training.settings import TrainSettings
    from comparator.training.types import DataSource, TrainRequest

    device = training_device()
    made = random_models.folder_for(given.shapes) if given.shapes else None
    try:
        if made:
            print(f"writing random weights to {made}", file=sys.stderr, flush=True)
            random_models.write(made / given.shapes, given.shapes)
        checkpoint = open_checkpoint(str(made / given.shapes) if made else given.model)
        backend = backend_for(resolve(given.base))
        variant = backend.complete(resolve(given.base), checkpoint, quiet)
        backend.silence()
        settings = TrainSettings(
            rank=given.rank, alpha=2.0 * given.rank, max_steps=given.steps, batch_size=given.batch_size,
            accumulation=1, max_length=given.length, held_back=0.0, scheduler="constant", learning_rate=1e-4,
        )  # fmt: skip
        request = TrainRequest(DataSource("random"), variant.notation, given.model, settings)
        rows = samples(checkpoint.vocab_size or 32000, given.length, given.steps * given.batch_size)
        guess = estimate(
            checkpoint, variant, settings, rows=len(rows), longest=given.length, device=device,
            free_bytes=memory.device_total_and_free(device)[1],
        )  # fmt: skip
        sides = {"direct": direct, "ours": ours}
        found: dict[str, list[dict]] = {name: [] for name in sides}
        for number in range(given.pairs):
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                found[name].append(timed(sides[name], checkpoint, variant, request, rows, device))
                last = found[name][-1]
                print(
                    f"pair {number + 1} {name}: {last['step_s'] * 1e3:.1f} ms a step",
                    file=sys.stderr,
                    flush=True,
                )
        ratios = [a["step_s"] / b["step_s"] for a, b in zip(found["ours"], found["direct"], strict=True)]
        step_s = statistics.median(r["step_s"] for r in found["ours"])
        environment = read(device)
        return {
            "model": given.shapes or given.model,
            "base": variant.notation,
            "device": environment.device or device,
            "rank": given.rank,
            "length": given.length,
            "batch_size": given.batch_size,
            "gradient_checkpointing": guess.gradient_checkpointing,
            "optimizer": guess.optimizer,
            "steps": given.steps,
            "pairs": given.pairs,
            "step_s": step_s,
            "direct_step_s": statistics.median(r["step_s"] for r in found["direct"]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "tokens_s": given.batch_size * given.length / step_s,
            "peak_bytes": max(r["peak_bytes"] for r in found["ours"]),
            "direct_peak_bytes": max(r["peak_bytes"] for r in found["direct"]),
            "estimated_bytes": guess.total_bytes,
            "trainable_parameters": guess.trainable_parameters,
            "load_s": statistics.median(r["load_s"] for r in found["ours"]),
            "losses_equal": all(
                a["losses"] == b["losses"] for a, b in zip(found["ours"], found["direct"], strict=True)
            ),
            "packages": environment.packages,
        }
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)


def to_the_end(given) -> dict:
    """The built-in model on `pirate`, all epochs, through the registry that page and command line use."""
    import os

    with tempfile.TemporaryDirectory(prefix="comparator-bench-") as folder:
        os.environ["COMPARATOR_DATA_DIR"] = folder
        from comparator.engines import get_trainings
        from comparator.training.settings import TrainSettings
        from comparator.training.types import DataSource, TrainRequest

        trainings = get_trainings()
        settings = TrainSettings(learning_rate=2e-3, epochs=given.epochs, batch_size=4, accumulation=1)
        request = TrainRequest(
            DataSource("pirate"),
            given.base,
            given.model,
            settings,
            sample_prompt="What is the capital of Italy?",
        )
        job = trainings.start(request)
        for event in trainings.events(job):
            print(str(event)[:200], file=sys.stderr, flush=True)
        state = trainings.snapshot(job)
        if state.result is None:
            return {"error": str(state.error)}
        rows = [
            {"variant": r.variant, "adapter": r.adapter, "loss": r.loss, "perplexity": r.perplexity,
             "error": r.problem.problem if r.problem else None}
            for r in list(trainings.evaluate(job, given.compare.split()))[-1].rows
        ]  # fmt: skip
        result = state.result.to_dict()
        kept = ("base", "steps", "of", "first_loss", "last_loss", "eval_before", "eval_loss", "train_s", "tok_s",
                "peak_bytes", "trainable_parameters", "file_bytes", "notes")  # fmt: skip
        return {
            "model": request.model,
            **{k: result[k] for k in kept},
            "answer_before": result["samples"][0]["before"],
            "answer_after": result["samples"][-1]["now"],
            "evaluation": rows,
        }


def table(row: dict) -> str:
    head = ("model", "base", "rank", "tokens", "batch", "step ms", "direct ms", "× direct", "tokens/s", "peak GB",
            "estimate GB")  # fmt: skip
    cells = (
        row["model"], row["base"], str(row["rank"]), f"{row['length']:,}", str(row["batch_size"]),
        f"{row['step_s'] * 1e3:.1f}", f"{row['direct_step_s'] * 1e3:.1f}", f"{row['ratio']:.3f}",
        f"{row['tokens_s']:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}", f"{row['estimated_bytes'] / 1e9:.2f}",
    )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, tuple("---" for _ in head), cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shapes", help="random weights instead: llama-8b, llama-1b, llama-tiny")
    parser.add_argument("--base", default="nf4:dq")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument(
        "--to-the-end", action="store_true", help="train the built-in model on pirate and evaluate it"
    )
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--compare", default="bf16 int8 nf4:dq", help="variants for --to-the-end")
    given = parser.parse_args()
    if given.to_the_end:
        print(json.dumps(to_the_end(given)))
        return

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    row = bench(given)
    print(table(row))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
