"""What a Ray actor costs: decode speed beside in-process in alternating pairs, and how much later tokens arrive.

    python scripts/bench_cluster.py --variant bf16 --pairs 15 --tokens 64

Starts a Ray of one node on this machine that lends `--threads` cores, so both sides have the same; the arrival of a token is
comparable because both processes read one clock (CLOCK_MONOTONIC). Prints medians over the pairs; on a machine that
others use too, the spread of the pairs says how far to trust them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Once:
    decode_tok_s: float
    late_s: list[float]  # from a token's own time to its arrival here, one a token


def once(engine, handle: str, prompt, settings) -> Once:
    """One run; every token's delay on the way to whoever reads."""
    late: list[float] = []

    def on_chunk(chunk) -> None:
        now = time.perf_counter()
        late.extend(now - at for at in chunk.times_s)

    run = engine.generate(handle, prompt, settings, threading.Event(), on_chunk)
    return Once(run.latency.decode_tok_s, late)


def loaded(engine, model: str, variant):
    from comparator.core.messages import LoadRequest

    return engine.load(LoadRequest(model, variant), threading.Event()).handle


def share(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides")
    given = parser.parse_args()

    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    from comparator.backends import resolve
    from comparator.cluster import ClusterEngine
    from comparator.core.request import GenerationSettings
    from comparator.core.settings import Settings
    from comparator.engine.local import LocalEngine

    head = {"num_cpus": given.threads, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    ray = Cluster(initialize_head=True, head_node_args=head)
    here, there = (
        LocalEngine(Settings()),
        ClusterEngine(Settings(ray_address=ray.address, ray_without_token=True)),
    )
    try:
        import torch

        here._call(lambda: torch.set_num_threads(given.threads))
        variant, settings = resolve(given.variant), GenerationSettings(max_new_tokens=given.tokens)
        for engine in (here, there):
            engine.open(given.model, threading.Event())
        prompt = here.encode(given.model, "Tell me a story about a lighthouse.", None, None)
        sides = [(e, loaded(e, given.model, variant)) for e in (here, there)]
        for engine, handle in sides:
            once(engine, handle, prompt, settings)  # warm
        pairs: list[tuple[Once, Once]] = []
        for number in range(given.pairs):
            order = (0, 1) if number % 2 == 0 else (1, 0)  # whoever goes first gains nothing
            found = {side: once(*sides[side], prompt, settings) for side in order}
            pairs.append((found[0], found[1]))
        report(given, pairs)
    finally:
        there.close()
        ray.shutdown()


def report(given, pairs: list[tuple[Once, Once]]) -> None:
    ratios = sorted(b.decode_tok_s / a.decode_tok_s for a, b in pairs)
    print(
        f"{given.variant}, {given.tokens} tokens, {len(pairs)} pairs, {given.threads} of {os.cpu_count()} cores"
    )
    for name, side in (("in process", 0), ("in an actor", 1)):
        speeds = [pair[side].decode_tok_s for pair in pairs]
        late = [value * 1e3 for pair in pairs for value in pair[side].late_s]
        print(
            f"{name:12} decode {statistics.median(speeds):6.2f} tok/s ({min(speeds):.2f} to {max(speeds):.2f}); a token "
            f"arrives {statistics.median(late):.2f} ms later (p90 {share(late, 0.9):.2f}, p99 {share(late, 0.99):.2f})"
        )
    low, high = share(ratios, 0.25), share(ratios, 0.75)
    print(
        f"actor over in process: median {statistics.median(ratios):.4f} (middle half {low:.4f} to {high:.4f})"
    )


if __name__ == "__main__":
    main()
