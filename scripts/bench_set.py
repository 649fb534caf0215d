"""How long the result of a large prompt set takes to open in a browser, and what it puts on the page.

    python scripts/bench_set.py --prompts 1000

Saves a set of synthetic answers in four columns, starts the app on it and opens its link in Chromium: once with an empty cache,
then --times again with a warm one, as somebody meets it who has the page. Each is timed from the start of the navigation to the
first row of the matrix, with the CPU time that the server and the browser's process spend on it, which another load of the machine does
not change; beside the same for the empty page and for a comparison of one prompt. Prints one JSON line; exits 1 where the
median is over a second longer than that of one prompt, or more than 20 MB are transferred.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
LIMIT_S, LIMIT_MB = 1.0, 20.0


def main() -> int:
    import psutil
    import sample
    from bench_links import start
    from playwright.sync_api import sync_playwright

    from comparator.core.settings import Settings
    from comparator.store import open_store

    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--prompts", type=int, default=1000)
    given.add_argument("--times", type=int, default=5)
    options = given.parse_args()
    comparison = sample.with_set(options.prompts, "The city of Paris is the capital of France. " * 8)
    with tempfile.TemporaryDirectory() as folder:
        with open_store(Settings(data_dir=Path(folder))) as store:
            one, many = store.save(sample.comparison()), store.save(comparison)
        process, url = start(Path(folder))
        links = {
            "set": (f"{url}?c={many}", "#set-matrix .set-row"),
            "one_prompt": (f"{url}?c={one}", ".card h2, .card header"),
            "empty": (url, "#prompt-set input"),
        }
        visits: dict[str, list[dict[str, float]]] = {name: [] for name in links}
        try:
            with sync_playwright() as driver:
                chromium = shutil.which("chromium") or shutil.which("chromium-browser")
                browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page, server = browser.new_context().new_page(), psutil.Process(process.pid)
                first = opened(page, server, *links["set"])
                for _ in range(options.times):
                    for name, link in links.items():
                        visits[name].append(opened(page, server, *link))
                browser.close()
        finally:
            process.terminate()
            process.wait(20)
    medians = {
        name: {key: round(statistics.median(v[key] for v in those), 2) for key in those[0]}
        for name, those in visits.items()
    }
    print(
        json.dumps({"prompts": options.prompts, "columns": len(comparison.cells), "first": first, **medians})
    )
    longer_s = medians["set"]["wall_s"] - medians["one_prompt"]["wall_s"]
    return 0 if longer_s <= LIMIT_S and first["transferred_mb"] <= LIMIT_MB else 1


def opened(page: Any, server: Any, url: str, selector: str) -> dict[str, float]:
    """Navigate, and wait for `selector`: seconds of wall time until then, of CPU time until a second later, MB over the network, of
    the scripts' heap and of the HTML."""
    session, received = page.context.new_cdp_session(page), [0.0]
    for domain in ("Network", "Performance"):
        session.send(f"{domain}.enable")
    session.on(
        "Network.dataReceived", lambda data: received.__setitem__(0, received[0] + data["encodedDataLength"])
    )
    page.goto("about:blank")
    before = cpu_s(session, server)
    page.goto(url, wait_until="commit")
    page.wait_for_selector(selector, state="attached", timeout=120_000)
    wall_s = page.evaluate("() => performance.now() / 1000")  # since the navigation began
    page.wait_for_timeout(1000)
    after = cpu_s(session, server)
    session.send("HeapProfiler.collectGarbage")
    heap, html = page.evaluate(
        "() => [performance.memory.usedJSHeapSize, document.documentElement.outerHTML.length]"
    )
    session.detach()
    return {
        "wall_s": round(wall_s, 2), "server_cpu_s": round(after[0] - before[0], 2),
        "browser_cpu_s": round(after[1] - before[1], 2), "transferred_mb": round(received[0] / 1e6, 2),
        "script_heap_mb": round(heap / 1e6, 1), "html_mb": round(html / 1e6, 2),
    }  # fmt: skip


def cpu_s(session: Any, server: Any) -> tuple[float, float]:
    """CPU time so far of the server, and of the process that draws the page."""
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    times = server.cpu_times()
    return times.user + times.system, metrics["ProcessTime"]


if __name__ == "__main__":
    sys.exit(main())
