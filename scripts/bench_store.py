"""How fast the history is with many saved comparisons: opening, listing, searching, opening a link, making it anew.

    python scripts/bench_store.py --documents 10000

Fills a temporary data folder through the store itself (without waiting for the disk after each file, which only
filling skips), then measures from fresh processes and prints one JSON line last. Exit code 1 if opening, listing or
a search took longer than `--limit` seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparator.core.request import GenerationSettings
from comparator.core.result import CellResult, Comparison, Environment, LayerRow, Memory, PromptInfo
from comparator.core.settings import Settings
from comparator.store import open_store

WORDS = (
    "the capital of France explain quantization to a child write a poem about rain in Seoul 한국의 수도는 어디 "
    "summarize this text translate into Japanese 東京 why is the sky blue list three reasons code a parser"
).split()
MODELS = ("smollm2-135m", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-4B", "mistralai/Mistral-7B-v0.3")
VARIANTS = ("bf16", "int8", "nf4", "nf4:dq", "fp4", "gptq:4bit,g128")
QUERIES = ("France", "nf4:dq llama", "東京", "gptq seoul rain", "no such words anywhere", "%' OR 1=1 --")


def comparison(random_: random.Random, number: int) -> Comparison:
    prompt = " ".join(random_.choices(WORDS, k=random_.choice((8, 40, 700)))) + f" #{number}"
    row = LayerRow("model.layers.0.mlp.up_proj.weight", "Linear4bit", "Params4bit", "uint8", "nf4", "bf16",
                   (1536, 576), (442368, 1), 884736, 442368, 55296, 4.5, "cuda:0")  # fmt: skip
    cells = tuple(
        CellResult(
            v, text=prompt[:400], token_ids=tuple(range(64)), layers=(row,) * 8, memory=Memory(weight_bytes=1)
        )
        for v in random_.sample(VARIANTS, 3)
    )
    return Comparison(
        "x",
        f"2026-{1 + number % 12:02}-{1 + number % 28:02}T12:00:00+00:00",
        PromptInfo(prompt),
        GenerationSettings(),
        Environment(device=random_.choice(("NVIDIA H100 80GB", "CPU, 2 cores"))),
        random_.choice(MODELS),
        cells=cells,
    )


def timed(work) -> tuple[float, object]:
    start_s = time.perf_counter()
    result = work()
    return time.perf_counter() - start_s, result


def measure(settings: Settings) -> dict[str, float]:
    """In a process of its own, so that nothing is warm but the system's file cache."""
    figures: dict[str, float] = {}
    store = open_store(settings)
    opened_s, first = timed(lambda: store.search(limit=50))
    figures["open_and_list_s"] = opened_s
    figures["list_again_s"] = timed(lambda: store.search(limit=50))[0]
    figures["last_page_s"] = timed(lambda: store.search(limit=50, offset=store.count() - 50))[0]
    figures["worst_search_s"] = max(timed(lambda q=q: store.search(q, limit=50))[0] for q in QUERIES)
    figures["worst_count_s"] = max(timed(lambda q=q: store.count(q))[0] for q in QUERIES)
    figures["open_link_s"] = max(timed(lambda e=e: store.load(e.id))[0] for e in first[:20])
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=0.5, help="seconds that opening or a search may take")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--anew", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        settings = Settings(data_dir=args.measure, public=False)
        if args.anew:
            with open_store(settings) as store:
                print(json.dumps({"reindex_s": timed(store.reindex)[0]}))
        else:
            print(json.dumps(measure(settings)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-store-") as folder:
        settings = Settings(data_dir=Path(folder), public=False)
        random_, fsync = random.Random(0), os.fsync
        os.fsync = lambda handle: None
        try:
            with open_store(settings) as store:
                for number in range(args.documents):
                    store.save(comparison(random_, number))
        finally:
            os.fsync = fsync
        figures: dict[str, float] = {"documents": args.documents}
        for extra in ([], ["--anew"]):
            done = subprocess.run(
                [sys.executable, __file__, "--measure", folder, *extra],
                check=True,
                capture_output=True,
                text=True,
            )
            figures |= json.loads(done.stdout)
    slow = {
        k: v for k, v in figures.items() if k.endswith(("list_s", "search_s", "count_s")) and v > args.limit
    }
    print(json.dumps({k: round(v, 4) for k, v in figures.items()}))
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
