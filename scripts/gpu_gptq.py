"""GPTQ on a CUDA GPU: quantize a model there, run it with several kernels, compare their tokens and divergence.

    python scripts/gpu_gptq.py --model smollm2-135m --kernels exllama_v2,triton,torch --out results/

Needs no network and no gradio. `--model` takes what the command line takes (a folder, a .gguf file). Writes
gptq.json and gptq.md to --out and prints the table; the exit code is 0 if every kernel that can run here ran.
Kernels that have to be compiled are compiled (the time is told apart from loading). With --spread the model is also
spread over GPU and CPU with max_memory, and the devices that the Layers table then shows are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "def fibonacci(n):",
    "Explain why the sky is blue.",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kernels", default="auto,triton,torch,exllama_v2,marlin")
    parser.add_argument("--variant", default="gptq:4bit", help="without kernel=")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--decode", default="auto")
    parser.add_argument("--spread", default="", help="max_memory for one more run, e.g. 0=150MB,cpu=4GiB")
    parser.add_argument(
        "--skip-text", action="store_true", help="leave out the divergence on the longer text"
    )
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()

    import comparator

    timed = Timed()
    variants = ["bf16", "fp16", "nf4"]
    for kernel in given.kernels.split(","):
        variants.append(given.variant + ("" if kernel == "auto" else f",kernel={kernel}"))
    documents = []
    for number, prompt in enumerate(PROMPTS):
        events = comparator.compare(
            prompt,
            variants,
            given.model,
            fidelity="text" if number == 0 and not given.skip_text else "none",
            max_new_tokens=given.tokens,
            decode=given.decode,
        )
        documents.append(timed.drain(events))
    rows = [figures(documents, timed, column) for column in range(len(variants))]
    result = {
        "environment": documents[0].to_dict()["environment"],
        "seconds": timed.seconds,
        "columns": rows,
        "spread": spread(given) if given.spread else None,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gptq.json").write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    text = table(result)
    (given.out / "gptq.md").write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps({k: result[k] for k in ("seconds", "columns", "spread")}, default=str))
    return 0 if all(row["status"] == "ok" or "cannot run this" in (row["error"] or "") for row in rows) else 1


class Timed:
    """Drains events, prints what is new, and adds up how long each column quantized and compiled."""

    def __init__(self):
        self.seconds: dict[str, dict[str, float]] = {}

    def drain(self, events):
        from comparator.core.events import Done, Failed, Loading

        doing, since, label, on_progress = "", time.perf_counter(), "", ""
        for event in events:
            now, kind = time.perf_counter(), ""
            if isinstance(event, Loading):
                words = event.message.split()[:1]
                kind = words[0] if words and words[0] in ("quantizing", "compiling", "writing") else ""
                if event.message != on_progress:
                    on_progress = event.message
                    print(f"{event.cell.label}: {on_progress}", file=sys.stderr, flush=True)
            if doing:
                column = self.seconds.setdefault(label, {})
                column[doing] = column.get(doing, 0.0) + now - since
            doing, since = kind, now
            label = event.cell.label if hasattr(event, "cell") else label
            if isinstance(event, Failed):
                print(f"{label} failed: {event.problem} {event.advice}", file=sys.stderr, flush=True)
            if isinstance(event, Done):
                return event.comparison
        raise AssertionError("a comparison always ends with Done")


def figures(documents, timed: Timed, column: int) -> dict:
    """One column over all prompts; decode speed and TTFT are medians over the prompts."""
    from statistics import median

    cells = [d.cells[column] for d in documents]
    first = cells[0]
    speeds = [c.latency.decode_tok_s for c in cells if c.latency.decode_tok_s]
    ttfts = [c.latency.ttft_s for c in cells if c.latency.ttft_s]
    text = (first.fidelity.text if first.fidelity else None) or {}
    return {
        "variant": first.variant,
        "status": first.status,
        "error": first.error.problem if first.error else None,
        "kernel": first.kernel,
        "decode_path": first.decode_path,
        "load_s": first.latency.load_s,
        "ttft_s": median(ttfts) if ttfts else None,
        "decode_tok_s": median(speeds) if speeds else None,
        "weight_bytes": first.memory.weight_bytes,
        "quant_state_bytes": first.memory.quant_state_bytes,
        "resident_bytes": first.memory.resident_bytes,
        "run_peak_bytes": first.memory.run_peak_bytes,
        "kl": (text.get("kl") or {}).get("mean"),
        "kl_se": (text.get("kl") or {}).get("se"),
        "notes": list(first.notes),
        "texts": [c.text for c in cells],
        "token_ids": [list(c.token_ids) for c in cells],
        "layer_dtypes": dict(Counter(f"{r.logical_dtype} as {r.storage_dtype}" for r in first.layers)),
    }


def spread(given) -> list[dict]:
    """The same variants over GPU and CPU: which devices the layers lie on, and whether the tokens stay."""
    import comparator

    found = []
    for variant in ("bf16", "int8", "nf4", given.variant, f"{given.variant},kernel=exllama_v2"):
        comparison = comparator.run(
            PROMPTS[0], [variant], given.model, fidelity="none", max_new_tokens=16, max_memory=given.spread
        )
        cell = comparison.cells[0]
        found.append(
            {
                "variant": cell.variant,
                "status": cell.status,
                "error": f"{cell.error.problem} {cell.error.advice}" if cell.error else None,
                "text": cell.text,
                "devices": dict(Counter(row.device for row in cell.layers)),
                "weight_bytes": cell.memory.weight_bytes,
                "resident_bytes": cell.memory.resident_bytes,
                "kernel": cell.kernel,
            }
        )
    return found


def table(result: dict) -> str:
    def number(value, scale=1.0, digits=1):
        return "–" if value is None else f"{value * scale:.{digits}f}"

    tokens = [
        row["token_ids"]
        for row in result["columns"]
        if row["variant"].startswith("gptq") and row["status"] == "ok"
    ]
    lines = [
        f"{result['environment'].get('device')}, torch {result['environment']['packages'].get('torch')}, gptqmodel "
        f"{result['environment']['packages'].get('gptqmodel')}",
        "",
        "| variant | kernel | decode tok/s | TTFT ms | load s | weights + state MB | KL (text), nats | same tokens |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in result["columns"]:
        if row["status"] != "ok":
            lines.append(f"| `{row['variant']}` | {row['error']} | – | – | – | – | – | – |")
            continue
        same = "–"
        if row["variant"].startswith("gptq"):
            equal = sum(a == b for a, b in zip(row["token_ids"], tokens[0], strict=True))
            same = f"{equal} of {len(tokens[0])} answers"
        stored = (row["weight_bytes"] or 0) + (row["quant_state_bytes"] or 0)
        kl = "–" if row["kl"] is None else f"{row['kl']:.4f} ± {row['kl_se']:.4f}"
        lines.append(
            f"| `{row['variant']}` | {row['kernel']}, {row['decode_path']} | {number(row['decode_tok_s'])} | "
            f"{number(row['ttft_s'], 1e3)} | {number(row['load_s'], 1, 2)} | {number(stored, 1e-6)} | {kl} | {same} |"
        )
    lines += ["", "Seconds of quantizing and compiling, which are no part of loading:", ""]
    lines += [
        f"- `{k}`: " + ", ".join(f"{w} {s:.1f} s" for w, s in v.items()) for k, v in result["seconds"].items()
    ]
    for entry in result["spread"] or []:
        lines.append(
            f"- spread `{entry['variant']}`: {entry['status']}, {entry['devices']} {entry['error'] or ''}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
