"""Pictures of every tab in both themes at four widths, of a comparison that fills every field, and what is wrong in them.

    python scripts/screenshots.py [FOLDER]      # `make screenshots` writes to build/screenshots

Lists whatever makes the page scroll sideways, and text that is cut without an ellipsis and a title; exit code 1 if there is any.
Needs Chromium, as the browser tests do.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WIDTHS = (1440, 1024, 390, 320)


def main(folder: Path) -> int:
    import sample
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        os.environ["COMPARATOR_DATA_DIR"] = place
        id = _save(sample.comparison())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        app = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py")], cwd=ROOT, env=os.environ | {"COMPARATOR_PORT": str(port)}
        )
        try:
            _wait(f"http://127.0.0.1:{port}/")
            with sync_playwright() as driver:
                chromium = shutil.which("chromium") or shutil.which("chromium-browser")
                browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                faults = [
                    fault
                    for dark in (False, True)
                    for width in WIDTHS
                    for fault in _pictures(browser, f"http://127.0.0.1:{port}/?c={id}", folder, width, dark)
                ]
                browser.close()
        finally:
            app.terminate()
            app.wait(20)
    print("\n".join(faults) or "Nothing scrolls sideways, and no text is cut.")
    return 1 if faults else 0


def _save(comparison) -> str:
    from comparator.store import open_store

    with open_store() as store:
        return store.save(comparison)


def _wait(url: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("The page did not start.")


def _pictures(browser, url: str, folder: Path, width: int, dark: bool) -> list[str]:
    from page_checks import clipped, settled, sideways, tabs

    theme = "dark" if dark else "light"
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce"
    )
    page, faults = context.new_page(), []
    page.set_default_timeout(90_000)
    page.goto(url)
    page.wait_for_selector(".card")
    page.wait_for_selector('#tabs button[role="tab"]', state="attached")
    for name in tabs(page):
        page.evaluate("(name) => qc.openTab(name)", name)
        page.wait_for_timeout(1200)  # the server fills a tab that is opened for the first time
        page.screenshot(path=folder / f"{name.lower()}-{width}-{theme}.png", full_page=True)
        settled(page)
        faults += [f"{name}, {width} px, {theme}: {fault}" for fault in (*sideways(page), *clipped(page))]
    context.close()
    return faults


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/screenshots")))
