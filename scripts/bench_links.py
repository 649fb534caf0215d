"""How long a shared link takes to answer while the engine is busy, and whether visitors who wait are all served.

    python scripts/bench_links.py --visitors 20 --tokens 4

Starts the app on a folder of its own, saves a comparison, lets that many visitors run the built-in model at once over
the API, and meanwhile asks for the link again and again, as the page does when it opens. Prints one JSON line; exits 1
when a visitor was lost or the 95th percentile is over half a second.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 0.5


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "COMPARATOR_PORT": str(port),
        "COMPARATOR_DATA_DIR": str(folder),
        "COMPARATOR_QUEUE_SIZE": "100",
    }
    process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], cwd=ROOT, env=os.environ | variables)
    url = f"http://127.0.0.1:{port}/"
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return process, url
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise SystemExit("The page did not come up within a minute.")


def opener(url: str) -> int:
    """The number of the listener that opens a link: past the queue, when the page loads, with the most outputs."""
    with urllib.request.urlopen(url + "config", timeout=30) as reply:
        found = json.load(reply)["dependencies"]
    loading = [d for d in found if any(t[1] == "load" for t in d["targets"]) and d["queue"] is False]
    return max(loading, key=lambda d: len(d["outputs"]))["id"]


def visit(url: str, number: int, tokens: int) -> tuple[float, str]:
    from gradio_client import Client

    began = time.monotonic()
    answer = Client(url, verbose=False).predict(
        f"Count to {number}.", ["bf16"], max_new_tokens=tokens, fidelity="none", api_name="/compare"
    )
    return time.monotonic() - began, answer["id"]


def resident_mb(pid: int) -> float:
    import psutil

    return psutil.Process(pid).memory_info().rss / 1e6


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--visitors", type=int, default=20)
    given.add_argument("--tokens", type=int, default=4)
    options = given.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(Path(folder))
        try:
            _, shared = visit(url, 1, options.tokens)  # the model is loaded from here on
            before = resident_mb(process.pid)
            listener, took_s = opener(url), []
            with concurrent.futures.ThreadPoolExecutor(options.visitors) as pool:
                waiting = [pool.submit(visit, url, n, options.tokens) for n in range(2, options.visitors + 2)]
                time.sleep(1)
                while not all(w.done() for w in waiting):
                    body = {"data": [], "fn_index": listener, "session_hash": secrets.token_hex(6)}
                    began = time.monotonic()
                    answer = post(f"{url}gradio_api/run/predict?c={shared}", body)
                    took_s.append(time.monotonic() - began)
                    assert "Count to 1." in json.dumps(answer), "the link did not open what it names"
                    time.sleep(0.2)
                served = [w.result() for w in waiting if w.exception() is None]
                for lost in filter(None, (w.exception() for w in waiting)):
                    print(f"lost: {type(lost).__name__}: {lost}", file=sys.stderr)
            after = resident_mb(process.pid)
        finally:
            process.terminate()
            process.wait(20)
    took_s.sort()
    p95_s = took_s[max(0, int(len(took_s) * 0.95) - 1)] if took_s else float("inf")
    result = {
        "visitors": options.visitors,
        "served": len({id for _, id in served}),
        "longest_wait_s": round(max((s for s, _ in served), default=0.0), 1),
        "opened": len(took_s),
        "open_median_s": round(statistics.median(took_s), 3) if took_s else None,
        "open_p95_s": round(p95_s, 3),
        "resident_before_mb": round(before),
        "resident_after_mb": round(after),
    }
    print(json.dumps(result))
    return 0 if result["served"] == options.visitors and p95_s <= LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
