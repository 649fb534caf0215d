"""The page's server without a browser: how it streams, who may call what, and visitors who vanish."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from comparator.core.request import BUILTIN_MODEL
from tests.ui.test_http_guard import get

PROMPT = "Write a long story about a lighthouse keeper and the sea."


class Client:
    """Speaks Gradio's queue protocol: one run, as the page would start it."""

    def __init__(self, url: str):
        self.url = url
        self.config = json.load(urllib.request.urlopen(url + "config", timeout=30))
        self.session = uuid.uuid4().hex

    def run_listener(self) -> dict:
        by_id = {c["id"]: c for c in self.config["components"]}
        run = next(i for i, c in by_id.items() if c["props"].get("elem_id") == "run")
        return next(
            d for d in self.config["dependencies"] if [run, "click"] in d["targets"] and d["backend_fn"]
        )

    def values(self, tokens: int, variants: list[str], **fields: object) -> list:
        """The form as a first visit shows it, with these changes; `fields` by id of element."""
        by_id = {c["id"]: c["props"] for c in self.config["components"]}
        changed = {"prompt": PROMPT, "set-max-new-tokens": tokens, **fields}
        values = []
        for number in self.run_listener()["inputs"]:
            props = by_id[number]
            value = changed.get(props.get("elem_id"), props.get("value"))
            if props.get("elem_id") == "variants":
                value = value | {"on": variants}
            values.append(value)
        return values

    def run(self, tokens: int = 8, variants: list[str] | None = None, **fields: object) -> Iterator[dict]:
        """Join the queue and yield its messages; closing the iterator hangs up."""
        body = {
            "data": self.values(tokens, variants or ["bf16"], **fields),
            "fn_index": self.run_listener()["id"],
            "session_hash": self.session,
        }
        post(self.url + "gradio_api/queue/join", body)
        with urllib.request.urlopen(
            f"{self.url}gradio_api/queue/data?session_hash={self.session}", timeout=240
        ) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    message = json.loads(line[5:]) | {"size": len(line)}
                    yield message
                    if message["msg"] in ("process_completed", "close_stream"):
                        return


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=30))


def test_only_what_changed_is_sent(server):
    messages = list(Client(server.url).run(tokens=150))
    assert messages[-1]["success"], messages[-1]
    streamed = [m for m in messages if m["msg"] == "process_generating"][1:-1]  # the first and last are whole
    assert len(streamed) > 3, "the answer did not stream"
    assert max(m["size"] for m in streamed) < 30_000
    small = sorted(m["size"] for m in streamed)[len(streamed) // 2]
    assert small < 6_000, f"a usual update weighs {small} bytes: more than the card that changed is sent"


def test_no_more_than_ten_updates_a_second(server):
    began = time.monotonic()
    count = sum(m["msg"] == "process_generating" for m in Client(server.url).run(tokens=150))
    assert count <= 10 * (time.monotonic() - began) + 2


def test_a_client_that_hangs_up_frees_the_engine(server):
    # 1,000 tokens of the whole model take much longer than noticing that nobody is there.
    gone = Client(server.url).run(tokens=1000, model=BUILTIN_MODEL)
    for message in gone:
        if message["msg"] == "process_generating" and "generating" in json.dumps(message):
            break
    gone.close()  # no heartbeat here, unlike in a browser: the server has to notice by itself
    began = time.monotonic()
    messages = list(Client(server.url).run(tokens=2))
    assert messages[-1]["success"]
    took = time.monotonic() - began
    assert took < 30, f"the engine was busy for {took:.0f} s with a client that had hung up"


def test_many_visitors_are_all_served(server):
    ended: list[bool] = []

    def visit() -> None:
        ended.append(list(Client(server.url).run(tokens=2))[-1]["success"])

    visitors = [threading.Thread(target=visit) for _ in range(6)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(200)
    assert ended == [True] * 6, "a waiting visitor was lost"


def test_every_listener_is_private(server):
    config = Client(server.url).config
    public = [
        d["api_name"]
        for d in config["dependencies"]
        if d["backend_fn"] and d.get("api_visibility") != "private"
    ]
    assert set(public) <= {"compare"}, "only the typed API may be public"
    info = json.load(urllib.request.urlopen(server.url + "gradio_api/info", timeout=30))
    assert set(info["named_endpoints"]) <= {"/compare"} and not info["unnamed_endpoints"]


@pytest.mark.parametrize(
    "path", ["gradio_api/file=/etc/passwd", "gradio_api/file=app.py", "monitoring", "gradio_api/runs"]
)
def test_nothing_else_is_served(server, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.url + path, timeout=30)
    assert refused.value.code in (401, 403, 404), f"{path} answered {refused.value.code}"


@pytest.mark.parametrize(
    "picked",
    [None, "bf16", [], {}, {"on": None}, {"on": ["bf16"] * 50}, {"on": [{"x": 1}]}, {"on": ["nf4:<script>"]},
     {"on": ["bf16"], "reference": ["x"]}, {"on": ["bf16"], "reference": "zz"}],
)  # fmt: skip
def test_a_forged_form_gets_an_answer_not_a_crash(server, picked):
    client = Client(server.url)
    body = client.values(2, ["bf16"])
    order = client.run_listener()["inputs"]
    by_id = {c["id"]: c["props"] for c in client.config["components"]}
    body = [picked if by_id[n].get("elem_id") == "variants" else v for n, v in zip(order, body, strict=True)]
    client.values = lambda *_, **__: body
    messages = list(client.run())
    assert messages[-1]["success"], messages[-1]
    said = json.dumps(messages[-1]["output"])
    assert "<script>" not in said.lower()


# ---------------------------------------------------------------- other sites, and programs


def test_a_private_server_refuses_a_rebound_name_and_another_sites_page(server):
    port = urlsplit(server.url).port
    assert get(server.url, host=f"localhost:{port}")[0] == 200
    status, _, said = get(server.url + "config", host=f"rebound.example:{port}")
    assert status == 403 and "components" not in said and "COMPARATOR_ALLOWED_HOSTS" in said
    # What such a page would send: its own name everywhere.
    rebound = {"host": f"rebound.example:{port}", "origin": f"http://rebound.example:{port}"}
    assert get(server.url + "config", **rebound)[0] == 403
    assert get(server.url + "config", origin="https://evil.example")[0] == 403
    assert get(server.url + "config", origin="null")[0] == 403
    assert get(server.url + "config", origin=server.url.rstrip("/"))[0] == 200
    headers = get(server.url)[1]
    assert (
        headers["x-content-type-options"] == "nosniff"
        and "frame-ancestors 'self'" in headers["content-security-policy"]
    )


def test_the_examples_of_the_api_work_on_loopback_without_a_token(server):
    from gradio_client import Client

    assert "/compare" in Client(server.url, verbose=False).view_api(return_format="dict")["named_endpoints"]
    body = json.dumps({"prompt": "", "variants": []}).encode()
    request = urllib.request.Request(
        server.url + "gradio_api/call/v2/compare", body, {"Content-Type": "application/json"}
    )
    assert "event_id" in json.load(urllib.request.urlopen(request, timeout=30))
