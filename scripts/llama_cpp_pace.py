"""How fast a `gguf@` column decodes, beside llama.cpp's own server in this Python: python scripts/llama_cpp_pace.py

The built-in model's file, the same prompt and number of tokens, greedy, alternating; the median of the ratios is what
the process, the pipe and the choice of tokens in the app's process cost. Both get the same threads and environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the column's process has it

MODEL, PROMPT = "smollm2-135m", "Write a long story about a lighthouse."


def serve(file: str, threads: int, tokens: int) -> None:
    """Answer each line of ids on stdin with the rate that llama.cpp's server reports. Run as a process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = file, 1024, 1
    parameters.cpuparams.n_threads = threads
    server = xllamacpp.Server(parameters)
    for line in sys.stdin:
        asked = {"prompt": json.loads(line), "max_tokens": tokens, "temperature": 0, "cache_prompt": False}
        asked |= {"ignore_eos": True}
        print(json.dumps(server.handle_completions(asked)["timings"]["predicted_per_second"]), flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--serve", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.serve:
        serve(options.serve, options.threads, options.tokens)
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from comparator.backends import resolve
    from comparator.core.messages import LoadRequest
    from comparator.core.request import GenerationSettings
    from comparator.engines import get_engine
    from comparator.sources.builtin import find_gguf

    engine, never = get_engine(), threading.Event()
    engine.open(MODEL, never)
    handle = engine.load(LoadRequest(MODEL, resolve(f"gguf@{MODEL}")), never).handle
    engine.slot(handle).rules.ends = frozenset()
    prompt = engine.encode(MODEL, PROMPT, None, None)
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(find_gguf()[0]), "--threads", str(options.threads), "--tokens",
         str(options.tokens)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    ratios = []
    for number in range(options.rounds):
        run = engine.generate(handle, prompt, GenerationSettings(max_new_tokens=options.tokens), never)
        server.stdin.write(json.dumps(list(prompt.token_ids)) + "\n")
        server.stdin.flush()
        theirs, ours = float(server.stdout.readline()), run.latency.decode_tok_s
        ratios.append(ours / theirs)
        print(
            f"{number + 1}: column {ours:.1f}, server {theirs:.1f} tok/s, ratio {ratios[-1]:.3f}", flush=True
        )
    server.kill()
    engine.unload()
    print(f"median ratio {statistics.median(ratios):.3f}, {options.threads} threads")


if __name__ == "__main__":
    main()
