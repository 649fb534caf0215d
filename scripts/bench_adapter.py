"""Columns with an adapter beside peft + `generate`, and the matrix variants × {none, adapter}, in one process.

    python scripts/bench_adapter.py [--variants "bf16 int8 nf4"] [--adapter pirate] [--new-tokens 48] [--pairs 3]

Per variant our base wears the adapter, and peft wraps a second copy of the same variant. Runs alternate (peft, ours,
peft, ours …) on the same token ids, none ending early; a ratio is the median of the pairs' ratios. Tokens are compared
before anything is timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def measure(pool, checkpoint, notation: str, wish: str, new: int, prompt: int, pairs: int) -> dict:
    """Figures of one variant; times in seconds."""
    import peft

    from comparator import adapters
    from comparator.adapters import attach
    from comparator.backends import backend_for, resolve
    from comparator.backends.base import Placement
    from comparator.benchmark.runs import endless, our_run, prompt_ids, stock_run
    from comparator.core.request import GenerationSettings
    from comparator.core.variant import parse_adapter

    def quiet(*_):
        pass

    adapter, variant = parse_adapter(wish), resolve(notation)
    backend = backend_for(variant)
    variant = backend.complete(variant, checkpoint, quiet)
    plan = adapters.plan(adapter, checkpoint, variant)
    slot, _ = pool.load(checkpoint, variant, None, True, set(), quiet, threading.Event(), plan)
    slot.attach(plan)
    fitted = slot.fitted(adapter)
    ids = prompt_ids(slot.model, prompt, 0)
    other = backend.load(checkpoint, variant, Placement(slot.device), quiet).model
    wrapped = peft.PeftModel.from_pretrained(other, str(plan.facts.files.path)).eval()
    settings = GenerationSettings(max_new_tokens=new)

    def speed(times: list[float]) -> float:
        return (len(times) - 1) / (times[-1] - times[0])

    def recording(worn):
        return slot.decoder.plan(ids, settings, adapter if worn else None, worn).recorded

    with endless(slot.model), endless(other):
        theirs = stock_run(wrapped, ids, new)[2]
        with attach.worn(fitted, adapter.scale):
            ours = our_run(slot, ids, new, None).token_ids
        runs: dict[str, list[float]] = {"none": [], "ours": [], "graph": [], "peft": []}
        for _ in range(pairs):
            runs["peft"].append(speed(stock_run(wrapped, ids, new)[1]))
            with attach.worn(fitted, adapter.scale):
                runs["ours"].append(speed(our_run(slot, ids, new, None).times_s))
                if (graph := recording(fitted)) is not None:
                    runs["graph"].append(speed(our_run(slot, ids, new, graph).times_s))
            runs["none"].append(speed(our_run(slot, ids, new, recording(None)).times_s))
    return {
        "variant": variant.notation,
        "kernel": slot.describe(False, plan).kernel,
        "tokens_equal": list(ours) == list(theirs),
        **{f"{name}_tok_s": statistics.median(v) if v else None for name, v in runs.items()},
        "ratio": statistics.median(a / b for a, b in zip(runs["ours"], runs["peft"], strict=True)),
        "adapter_load_s": fitted.load_s,
        "switch_s": fitted.switch_s,
        "adapter_bytes": fitted.bytes,
        "resident_bytes": slot.memory.resident_bytes,
    }


def table(rows: list[dict]) -> str:
    head = ("variant", "none tok/s", "adapter tok/s", "with graph", "peft + generate", "× peft", "tokens", "fit s",
            "switch ms", "adapter MB", "base MB")  # fmt: skip
    lines = [head, tuple("---" for _ in head)]
    for r in rows:
        if "error" in r:
            lines.append((r["variant"], r["error"], *[""] * (len(head) - 2)))
            continue
        graph = "–" if r["graph_tok_s"] is None else f"{r['graph_tok_s']:.1f}"
        lines.append((
            r["variant"], f"{r['none_tok_s']:.1f}", f"{r['ours_tok_s']:.1f}", graph, f"{r['peft_tok_s']:.1f}",
            f"{r['ratio']:.2f}", "equal" if r["tokens_equal"] else "differ", f"{r['adapter_load_s']:.2f}",
            f"{r['switch_s'] * 1e3:.2f}", f"{r['adapter_bytes'] / 1e6:.2f}", f"{r['resident_bytes'] / 1e6:.1f}",
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", default="bf16 int8 nf4")
    parser.add_argument("--adapter", default="pirate")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()

    import torch
    import transformers

    from comparator.core.errors import UserError
    from comparator.core.settings import get_settings
    from comparator.engine.pool import Pool
    from comparator.sources import open_checkpoint

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(given.model)
    rows = []
    for notation in given.variants.split():
        pool = Pool(get_settings())
        try:
            rows.append(
                measure(
                    pool,
                    checkpoint,
                    notation,
                    given.adapter,
                    given.new_tokens,
                    given.prompt_tokens,
                    given.pairs,
                )
            )
        except UserError as problem:
            rows.append({"variant": notation, "error": str(problem)})
        finally:
            pool.unload()
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
