"""What a request has to pass before the page sees it: host, origin, size of the body, token; and the headers it gets."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
import tracemalloc
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psutil
import pytest

from comparator.core.settings import Settings
from comparator.ui import http_guard
from comparator.ui.http_guard import BODY_BYTES, BodyLimit, Headers, Hosts, Token, allowed_hosts, new_token

CALL = "gradio_api/call/v2/compare"


def scope(
    path: str = "/", *, method: str = "GET", query: str = "", kind: str = "http", **headers: str
) -> dict:
    named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {
        "type": kind, "method": method, "path": path, "root_path": "", "query_string": query.encode(),
        "headers": named, "server": ("127.0.0.1", 7860), "scheme": "http",
    }  # fmt: skip


def call(app, asked: dict, *chunks: bytes) -> tuple[int | None, dict[str, str], bytes]:
    """Status, headers and body of the answer; the request's body comes in these chunks."""
    waiting, sent = list(chunks or (b"",)), []

    async def receive():
        data = waiting.pop(0)
        return {"type": "http.request", "body": data, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    # In a thread of its own: a browser test earlier in this process has left an event loop running in this one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, app(asked, receive, send)).result()
    start = next((m for m in sent if m["type"] == "http.response.start"), None)
    if start is None:
        return None, {}, json.dumps([m["type"] for m in sent]).encode()
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(m.get("body", b"") for m in sent)


async def page(scope, receive, send) -> None:
    """Reads a body as frameworks do: all of it, and a failure of reading is a 400."""
    status, more = 200, True
    try:
        while more:
            message = await receive()
            more = message.get("more_body", False)
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-page", b"1")]})
    await send({"type": "http.response.body", "body": b"the page"})


# ---------------------------------------------------------------- whose host


@pytest.mark.parametrize(
    ("variables", "taken", "refused"),
    [
        (  # a machine of one's own
            {},
            ["localhost", "localhost:7860", "LOCALHOST.:80", "127.0.0.1:7860", "127.1.2.3", "[::1]:7860", "[::1]"],
            ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0:7860",
             "192.168.0.5", "", "[::1", "localhost@evil.example", "xn--80ak6aa92e.com", "[evil.example]"],
        ),
        (  # reached by other machines: an address is no name that could be made to resolve here
            {"host": "0.0.0.0"},
            ["localhost:7860", "192.168.0.5:7860", "[fe80::1]:7860", socket.gethostname()],
            ["evil.example", "192.168.0.5.nip.io", "a.localhost.example"],
        ),
        ({"host": "box.lan"}, ["box.lan:7860", "localhost"], ["192.168.0.5", "evil.example", "box.lan.evil.example"]),
        ({"allowed_hosts": "Quant.Example, other"}, ["quant.example", "other:1", "localhost"], ["evil.example"]),
        ({"allowed_hosts": "*"}, ["evil.example"], []),
        ({"public": True}, ["any.hf.space"], []),  # whoever may ask for anything has nothing to be rebound to
        ({"auth": "ada:lovelace"}, ["quant.example"], []),
        ({"public": True, "allowed_hosts": "quant.example"}, ["quant.example", "127.0.0.1"], ["evil.example"]),
    ],
)  # fmt: skip
def test_which_hosts_are_answered(variables, taken, refused):
    settings = Settings(**{"host": "127.0.0.1", "public": False} | variables)
    guard = Hosts(page, allowed_hosts(settings), any_address=http_guard._is_any(settings.host))
    assert [h for h in taken if call(guard, scope(host=h))[0] != 200] == []
    assert [h for h in refused if call(guard, scope(host=h))[0] != 403] == []


def test_a_request_without_a_host_or_with_two_is_refused_and_told_the_setting():
    guard = Hosts(page, frozenset({"localhost"}))
    two = scope(host="localhost")
    two["headers"].append((b"host", b"evil.example"))
    for asked in (scope(), two):
        status, _, said = call(guard, asked)
        assert status == 403 and b"COMPARATOR_ALLOWED_HOSTS" in said
    assert call(guard, scope(kind="websocket", host="evil.example")) == (None, {}, b'["websocket.close"]')


# ---------------------------------------------------------------- how large


@pytest.mark.parametrize(
    ("length", "status"),
    [("0", 200), ("1000", 200), ("1001", 413), ("9" * 5000, 413), ("-1", 413), ("1e3", 413), ("\xb2", 413)],
)
def test_a_body_is_judged_by_its_length_unread(length, status):
    assert call(BodyLimit(page, 1000, 5000), scope(method="POST", content_length=length))[0] == status


def test_a_body_in_chunks_is_read_up_to_the_limit_and_no_further():
    guard = BodyLimit(page, 1000, 5000)
    assert call(guard, scope(method="POST"), b"x" * 500, b"x" * 500)[0] == 200
    status, headers, said = call(guard, scope(method="POST"), b"x" * 500, b"x" * 501, b"never read")
    assert status == 413 and headers["connection"] == "close" and b"page" not in said
    upload = scope("/gradio_api/upload", method="POST")
    assert call(guard, upload, b"x" * 4999)[0] == 200 and call(guard, upload, b"x" * 5001)[0] == 413
    # A length that lies: fewer bytes announced than come.
    assert call(guard, scope(method="POST", content_length="10"), b"x" * 1001)[0] == 413


# ---------------------------------------------------------------- who may in


def test_where_a_token_is_needed():
    def needed(**variables) -> bool:
        return new_token(Settings(**{"public": False} | variables)) is not None

    assert (
        needed(host="0.0.0.0") and needed(host="::") and needed(host="192.168.0.5") and needed(host="box.lan")
    )
    assert not needed(host="127.0.0.1") and not needed(host="localhost") and not needed(host="::1")
    assert not needed(host="0.0.0.0", auth="ada:lovelace") and not needed(host="0.0.0.0", public=True)
    assert new_token(Settings(host="0.0.0.0", public=False)) != new_token(
        Settings(host="0.0.0.0", public=False)
    )


def test_a_space_is_open_to_everybody_under_any_name(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "me/space")
    space = Settings()
    assert (space.public, space.host) == (True, "0.0.0.0")
    assert new_token(space) is None and allowed_hosts(space) is None
    layers = {layer.cls: layer.kwargs for layer in http_guard.middleware(space, None)}
    assert Token not in layers and layers[Headers] == {"embedded": True}
    # A Space that is not public has a token, under the Space's own name.
    monkeypatch.setenv("SPACE_HOST", "me-space.hf.space")
    own = Settings(public=False)
    assert new_token(own) and "me-space.hf.space" in allowed_hosts(own)


def test_the_token_is_taken_from_the_address_once_and_then_from_the_cookie():
    guard = Token(page, "secret-token")
    status, headers, said = call(guard, scope())
    assert status == 401 and b"?token=" in said and b"page" not in said
    for query in (
        "token=",
        "token=secret-toke",
        "token=Secret-token",
        "xtoken=secret-token",
        "token=secret-token%00",
    ):
        assert call(guard, scope(query=query))[0] == 401
    status, headers, _ = call(guard, scope(query="c=AbC&token=secret-token&v=nf4:dq"))
    assert status == 303 and headers["location"] == "/?c=AbC&v=nf4:dq", (
        "the token stays in the browser's history"
    )
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Path=/" in cookie
    pair = cookie.partition(";")[0]
    assert call(guard, scope(cookie=f"other=1; {pair}"))[0] == 200
    assert call(guard, scope(method="POST", cookie=pair))[0] == 200
    assert call(guard, scope(cookie=pair + "x"))[0] == 401
    assert call(guard, scope(authorization="Bearer secret-token"))[0] == 200
    assert call(guard, scope(authorization="Bearer wrong"))[0] == 401
    assert call(guard, scope(method="POST", query="token=secret-token"))[0] == 401, (
        "another site's form could send it"
    )
    assert call(guard, scope(kind="websocket")) == (None, {}, b'["websocket.close"]')


@pytest.mark.parametrize(
    "path", ["//evil.example", "/\\evil.example", "///evil.example/x", "/a\r\nset-cookie: x=1"]
)
def test_the_way_on_leads_to_no_other_host(path):
    _, headers, _ = call(Token(page, "t"), scope(path, query="token=t"))
    place = headers["location"]
    assert urlsplit(place).netloc == "" and not place.startswith(("//", "/\\")) and "\n" not in place


def test_a_forged_request_costs_little():
    guard = Token(page, "secret-token")
    began = time.process_time()
    tracemalloc.start()
    try:
        for asked in (
            scope(query="&".join(["token=x"] * 20_000)), scope(cookie="; ".join(["comparator-token-7860=x"] * 20_000)),
            scope(query="token=" + "x" * 1_000_000), scope(query="%" * 100_000), scope(authorization="Bearer " * 9_000),
        ):  # fmt: skip
            assert call(guard, asked)[0] == 401
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2


def test_headers_allow_the_hub_as_a_frame_on_a_space_only():
    def policy(embedded: bool) -> dict[str, str]:
        headers = call(Headers(page, embedded), scope())[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
        assert headers["x-page"] == "1"
        return dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))

    assert policy(False)["frame-ancestors"] == "'self'"
    assert policy(True)["frame-ancestors"] == "'self' https://huggingface.co https://*.huggingface.co"
    assert policy(False)["connect-src"] == "'self' data: blob:" and policy(False)["object-src"] == "'none'"


# ---------------------------------------------------------------- on real servers


def get(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text, without following a redirect."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        path = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        connection.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return (
            answer.status,
            {k.lower(): v for k, v in answer.getheaders()},
            answer.read().decode("utf-8", "replace"),
        )
    finally:
        connection.close()


def raw(url: str, head: str, chunk: bytes = b"", count: int = 0) -> tuple[int, float]:
    """Send a request by hand until it is answered; returns the status and the megabytes that were sent."""
    parts, sent = urlsplit(url), 0
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(head.replace("HOST", f"{parts.hostname}:{parts.port}").encode())
        connection.settimeout(0.01)
        answer = b""
        for _ in range(count):
            try:
                answer = connection.recv(4096)
                break
            except TimeoutError:
                pass
            except OSError:
                break
            connection.settimeout(30)
            try:
                connection.sendall(chunk)
                sent += len(chunk)
            except OSError:
                break  # closed, with the answer before it
            connection.settimeout(0.01)
        connection.settimeout(30)
        try:
            answer = answer or connection.recv(4096)
        except OSError:
            return 0, sent / 1e6
    return int(answer.split()[1]), sent / 1e6


def test_a_huge_body_is_refused_before_the_login_in_bounded_time_and_memory(with_password):
    server, _ = with_password
    process = psutil.Process(server.process.pid)
    time.sleep(1)
    before, began = process.memory_info().rss, time.monotonic()
    post = f"POST /{CALL} HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\n"
    assert raw(server.url, f"{post}Content-Length: {10**12}\r\n\r\n")[0] == 413
    piece = b"%x\r\n" % 1_000_000 + b" " * 1_000_000 + b"\r\n"
    status, sent_mb = raw(server.url, f"{post}Transfer-Encoding: chunked\r\n\r\n", piece, 400)
    assert status in (413, 0) and sent_mb < 100, f"{sent_mb} MB were taken"
    upload = (
        "POST /gradio_api/upload HTTP/1.1\r\nHost: HOST\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    )
    assert raw(server.url, f"{upload}Content-Length: {34 * 10**6}\r\n\r\n")[0] == 413
    small = urllib.request.Request(server.url + CALL, b"{}", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(small, timeout=30)
    assert refused.value.code == 401, "the login comes next"
    assert time.monotonic() - began < 30
    grown = process.memory_info().rss - before
    assert grown < 10 * BODY_BYTES + 200e6, f"{grown / 1e6:.0f} MB"  # torch loads meanwhile


def printed_token(server) -> str:
    until = time.monotonic() + 60
    while not (found := re.search(r"is at http://localhost:\d+/\?token=(\S+) ", server.said())):
        assert time.monotonic() < until, server.said()
        time.sleep(0.05)
    return found[1]


@pytest.fixture(scope="module")
def reachable(serve_file):
    """A server that other machines can reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", _taking_401(urllib.request.urlopen))
        return serve_file(COMPARATOR_HOST="0.0.0.0")


def test_off_loopback_a_token_is_asked_for_and_printed(reachable):
    server, token = reachable, printed_token(reachable)
    for path in ("", "config", "gradio_api/info", "theme.css", "gradio_api/mcp/"):
        assert get(server.url + path)[0] == 401, path
    status, headers, _ = get(f"{server.url}?token={token}")
    cookie = headers["set-cookie"].partition(";")[0]
    assert status == 303 and get(server.url, cookie=cookie)[0] == 200
    assert get(server.url + "config", cookie=cookie)[0] == 200
    assert get(server.url + "config", cookie=cookie, origin="https://evil.example")[0] == 403
    assert get(server.url + "config", cookie=cookie, host="rebound.example")[0] == 403
    from gradio_client import Client

    client = Client(server.url, headers={"Authorization": f"Bearer {token}"}, verbose=False)
    assert "/compare" in client.view_api(return_format="dict")["named_endpoints"]


@pytest.mark.browser
def test_in_a_browser_the_token_is_needed_once(reachable, open_at):
    server = reachable
    visitor = open_at(f"{server.url}?token={printed_token(server)}&p=Hello+ostrich")
    assert "token" not in visitor.page.url, "the token is in the browser's history"
    visitor.page.wait_for_function(
        "() => document.querySelector('#prompt textarea').value === 'Hello ostrich'", timeout=30_000
    )  # the rest of the link came through
    visitor.tab("History")  # a request of the page's own
    visitor.page.wait_for_function(
        "() => /No comparisons/.test(document.querySelector('#history').innerText)"
    )
    assert not visitor.complaints, "a part of the page was refused"
    visitor.page.goto(server.url)
    visitor.page.wait_for_selector(".pick", state="attached")
    # Leaving a page ends what it had asked for; that is no refusal.
    assert not [c for c in visitor.complaints if "401" in c or "403" in c], "a part of the page was refused"


class _Answered:
    status = 200

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def _taking_401(urlopen):
    """`start` waits for a 200; here the page is up as soon as it asks for the token."""

    def opened(*args, **options):
        try:
            return urlopen(*args, **options)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return _Answered()
            raise

    return opened
