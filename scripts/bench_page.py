"""What streaming over the page's HTTP interface costs in decode speed, beside the command line.

    python scripts/bench_page.py --pairs 10 --tokens 48

Starts the app on a folder of its own and lets both decode the same prompt in turns: the page's own Run, over Gradio's
queue, read by an HTTP client to the last update; and `python -m comparator run` in a process of its own. Each reports
its own decode tok/s in its document. Prints one JSON line with the ratios page ÷ command line; exits 1 when their median
is below 0.97.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from pathlib import Path

from bench_links import ROOT, post, start

LIMIT = 0.97
PROMPT = "Write a long story about a lighthouse keeper and the sea."


def run_on_page(url: str, variant: str, tokens: int) -> int:
    """Press Run as the page does and read every update; returns how many came."""
    with urllib.request.urlopen(url + "config", timeout=30) as reply:
        config = json.load(reply)
    properties = {c["id"]: c["props"] for c in config["components"]}
    button = next(i for i, p in properties.items() if p.get("elem_id") == "run")
    listener = next(
        d for d in config["dependencies"] if [button, "click"] in d["targets"] and d["backend_fn"]
    )
    changed = {"prompt": PROMPT, "set-max-new-tokens": tokens}
    values = []
    for number in listener["inputs"]:
        value = changed.get(properties[number].get("elem_id"), properties[number].get("value"))
        if properties[number].get("elem_id") == "variants":
            value = value | {"on": [variant]}
        values.append(value)
    session = uuid.uuid4().hex
    post(url + "gradio_api/queue/join", {"data": values, "fn_index": listener["id"], "session_hash": session})
    updates = 0
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=300) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                updates += message["msg"] == "process_generating"
                if message["msg"] == "process_completed":
                    assert message["success"], message
                    return updates
    raise SystemExit("The page closed the stream before the run was over.")


def newest_on_page() -> dict:
    """The only column of the comparison that the page saved last."""
    from comparator.core.document import dumps
    from comparator.store import open_store

    with open_store() as store:
        newest = store.search(limit=1)[0]
        return json.loads(dumps(store.load(newest.id)))["cells"][0]


def run_on_command_line(output: Path, variant: str, tokens: int) -> dict:
    command = [sys.executable, "-m", "comparator", "run", "-v", variant, "-p", PROMPT, "-n", str(tokens)]
    subprocess.run([*command, "-o", str(output)], cwd=ROOT, check=True, capture_output=True)
    return json.loads(output.read_text())["cells"][0]


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--pairs", type=int, default=10)
    given.add_argument("--tokens", type=int, default=48)
    given.add_argument("--variant", default="bf16")
    options = given.parse_args()
    sys.path.insert(0, str(ROOT))
    page, shell = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["COMPARATOR_DATA_DIR"] = str(folder)
        process, url = start(folder)
        try:
            run_on_page(url, options.variant, 4)  # the model is resident from here on

            def ask_page() -> None:
                updates.append(run_on_page(url, options.variant, options.tokens))
                page.append(newest_on_page())

            def ask_shell() -> None:
                shell.append(run_on_command_line(folder / "cli.json", options.variant, options.tokens))

            updates: list[int] = []
            for pair in range(options.pairs):
                for ask in (ask_page, ask_shell) if pair % 2 else (ask_shell, ask_page):
                    ask()
        finally:
            process.terminate()
            process.wait(20)
    for one, other in zip(page, shell, strict=True):
        assert one["token_ids"] == other["token_ids"], "the two did not decode the same tokens"
    speeds = [[cell["latency"]["decode_tok_s"] for cell in cells] for cells in (page, shell)]
    ratios = [round(a / b, 3) for a, b in zip(*speeds, strict=True)]
    result = {
        "variant": options.variant,
        "tokens": len(page[0]["token_ids"]),
        "updates_per_run": statistics.median(updates),
        "page_tok_s": round(statistics.median(speeds[0]), 2),
        "command_line_tok_s": round(statistics.median(speeds[1]), 2),
        "ratios": ratios,
        "median_ratio": round(statistics.median(ratios), 3),
    }
    print(json.dumps(result))
    return 0 if result["median_ratio"] >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
