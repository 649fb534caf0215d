"""Whether honest visitors notice hostile ones: fifty at once on a public server of their own.

    python scripts/load_test.py --minutes 10

Starts the app in public mode on an empty folder and saves a comparison. Of fifty visitors, each with an address of their
own, two thirds open its link again and again, a few compare, and the others do what strangers do: bodies too large and too
slow, patterns without end, names of nobody, uploads, requests that nobody waits for, more of them than are allowed.
Prints one JSON line; exits 1 when an honest request was lost, the 95th percentile of opening a link is over half a second,
or the server's memory moved by more than 200 MB after the first fifth of the time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import secrets
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from bench_links import LIMIT_S, opener, start

MEMORY_MB = 200.0
HONEST, COMPARING = 30, 4  # of the visitors; the others are hostile
COMPARE = "gradio_api/call/v2/compare"


class Refused(Exception):
    """What the server said instead of an answer."""


class Load:
    """What all visitors share: the server, the clock, and what was counted."""

    def __init__(self, url: str, listener: int, end: float):
        self.url, self.listener, self.end = url, listener, end
        self.shared = ""
        self.took_s: list[float] = []
        self.compared_s: list[float] = []
        self.lost: list[str] = []
        self.hostile: collections.Counter[str] = collections.Counter()

    def over(self) -> bool:
        return time.monotonic() > self.end

    def ask(
        self, path: str, visitor: str, body: bytes | None = None, timeout_s: float = 60.0, **headers: str
    ) -> bytes:
        """Raises `urllib.error.HTTPError` for what is refused."""
        headers = {"Content-Type": "application/json", "X-Forwarded-For": visitor} | headers
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return reply.read()

    # ---- honest

    def open_link(self, visitor: str, id: str) -> str:
        """As the page does: the page itself, then the listener that reads the document."""
        self.ask(f"?c={id}", visitor)
        body = {"data": [], "fn_index": self.listener, "session_hash": secrets.token_hex(6)}
        return self.ask(f"gradio_api/run/predict?c={id}", visitor, json.dumps(body).encode()).decode()

    def compare(self, visitor: str, prompt: str, **changes: object) -> str:
        """The id of the saved comparison."""
        body = {
            "prompt": prompt,
            "variants": ["bf16"],
            "max_new_tokens": 4,
            "fidelity": "none",
            "repeats": 1,
            **changes,
        }
        event = json.loads(self.ask(COMPARE, visitor, json.dumps(body).encode()))["event_id"]
        answer = self.ask(f"gradio_api/call/compare/{event}", visitor, timeout_s=300.0).decode()
        last = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")][-1]
        answer = json.loads(last)
        if not isinstance(answer, list):
            raise Refused(str(answer)[:150])
        return answer[0]["id"]

    def honest(self, visitor: str) -> None:
        while not self.over():
            began = time.monotonic()
            try:
                if "Count to 1." not in self.open_link(visitor, self.shared):
                    raise ValueError("the link did not open what it names")
                self.took_s.append(time.monotonic() - began)
            except Exception as error:
                self.lost.append(f"link: {type(error).__name__}: {error}"[:200])
            time.sleep(random.uniform(2, 8))

    def comparing(self, visitor: str) -> None:
        while not self.over():
            began = time.monotonic()
            try:
                self.compare(visitor, f"Count to {random.randrange(100)}.")
                self.compared_s.append(time.monotonic() - began)
            except Exception as error:
                self.lost.append(f"comparison: {type(error).__name__}: {error}"[:200])
            time.sleep(random.uniform(15, 25))

    # ---- hostile

    def hostile_visitor(self, visitor: str) -> None:
        attacks = [getattr(self, name) for name in dir(self) if name.startswith("attack_")]
        while not self.over():
            attack = random.choice(attacks)
            try:
                attack(visitor)
                outcome = "answered"
            except urllib.error.HTTPError as error:
                outcome = str(error.code)
            except Exception as error:
                outcome = type(error).__name__
            self.hostile[f"{attack.__name__.removeprefix('attack_')}: {outcome}"] += 1
            time.sleep(random.uniform(0.2, 1.0))

    def attack_large_body(self, visitor: str) -> None:
        self.ask(COMPARE, visitor, b'{"prompt": "' + b"x" * 9_000_000 + b'"}')

    def attack_long_prompt(self, visitor: str) -> None:
        self.compare(visitor, "x " * 1_000_000)

    def attack_slow_body(self, visitor: str) -> None:
        where = urllib.parse.urlsplit(self.url)
        with socket.create_connection((where.hostname, where.port), timeout=15) as line:
            line.sendall(
                f"POST /{COMPARE} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 5000\r\n\r\n".encode()
            )
            for _ in range(10):
                line.sendall(b"x")
                time.sleep(1)

    def attack_endless_pattern(self, visitor: str) -> None:
        self.compare(visitor, "Hello", variants=["nf4:skip=(([a-z_.0-9])*)*!"])

    def attack_many_columns(self, visitor: str) -> None:
        self.compare(visitor, "Hello", variants=["bf16"] * 500)

    def attack_name_of_nobody(self, visitor: str) -> None:
        self.compare(visitor, "Hello", model=f"nobody/{secrets.token_hex(8)}")

    def attack_hang_up(self, visitor: str) -> None:
        body = {"prompt": "Hello", "variants": ["bf16"], "max_new_tokens": 200}
        event = json.loads(self.ask(COMPARE, visitor, json.dumps(body).encode()))["event_id"]
        self.ask(f"gradio_api/call/compare/{event}", visitor, timeout_s=0.5)

    def attack_many_requests(self, visitor: str) -> None:
        for _ in range(20):
            self.ask(COMPARE, visitor, json.dumps({"prompt": "Hello", "variants": ["bf16"]}).encode())

    def attack_upload(self, visitor: str) -> None:
        edge = secrets.token_hex(8)
        head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.json"\r\n\r\n'.encode()
        body = head + b"[" * 5_000_000 + f"\r\n--{edge}--\r\n".encode()
        self.ask(
            "gradio_api/upload", visitor, body, **{"Content-Type": f"multipart/form-data; boundary={edge}"}
        )

    def attack_links_of_nobody(self, visitor: str) -> None:
        for id in (secrets.token_urlsafe(16), "x" * 4000, "../../etc/passwd"):
            self.open_link(visitor, urllib.parse.quote(id, safe=""))

    def attack_sessions(self, visitor: str) -> None:
        for _ in range(10):
            self.ask(f"gradio_api/queue/data?session_hash={secrets.token_hex(2000)}", visitor, timeout_s=0.2)

    def attack_files(self, visitor: str) -> None:
        self.ask("gradio_api/file=/etc/passwd", visitor)


def memory_mb(pid: int) -> float:
    """Of the server and its children."""
    import psutil

    total = 0
    try:
        server = psutil.Process(pid)
        for process in (server, *server.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total / 1e6


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--minutes", type=float, default=10.0)
    given.add_argument("--visitors", type=int, default=50)
    options = given.parse_args()
    os.environ |= {"COMPARATOR_PUBLIC": "1", "COMPARATOR_BEHIND_PROXY": "1", "HF_HUB_OFFLINE": "1"}
    duration_s, memory = options.minutes * 60, []
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(Path(folder))
        try:
            load = Load(url, opener(url), 0.0)
            load.shared = load.compare("10.1.0.1", "Count to 1.")  # the model is loaded from here on
            began = time.monotonic()
            load.end = began + duration_s
            roles = [load.honest] * HONEST + [load.comparing] * COMPARING
            roles += [load.hostile_visitor] * (options.visitors - len(roles))
            visitors = [
                threading.Thread(target=role, args=(f"10.0.{n // 250}.{n % 250 + 1}",))
                for n, role in enumerate(roles[: options.visitors])
            ]
            for visitor in visitors:
                visitor.start()
            while not load.over():
                if time.monotonic() - began > duration_s / 5:
                    memory.append(memory_mb(process.pid))
                time.sleep(1)
            for visitor in visitors:
                visitor.join()
        finally:
            process.terminate()
            process.wait(20)
    took_s = sorted(load.took_s)
    p95_s = took_s[max(0, int(len(took_s) * 0.95) - 1)] if took_s else float("inf")
    moved_mb = max(memory) - min(memory) if memory else float("inf")
    result = {
        "minutes": options.minutes,
        "visitors": options.visitors,
        "links_opened": len(took_s),
        "open_median_s": round(took_s[len(took_s) // 2], 3) if took_s else None,
        "open_p95_s": round(p95_s, 3),
        "comparisons": len(load.compared_s),
        "comparison_longest_s": round(max(load.compared_s, default=0.0), 1),
        "honest_lost": len(load.lost),
        "memory_mb": [round(min(memory, default=0)), round(max(memory, default=0))],
        "hostile": dict(sorted(load.hostile.items())),
    }
    print(json.dumps(result))
    for problem, count in collections.Counter(load.lost).most_common(10):
        print(f"lost {count}: {problem}", file=sys.stderr)
    return 0 if not load.lost and p95_s <= LIMIT_S and moved_mb <= MEMORY_MB else 1


if __name__ == "__main__":
    sys.exit(main())
