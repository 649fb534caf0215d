"""The page and its configuration, rendered once for everybody: Gradio copies and writes 0.4 MB of it for each request.

They are the same for all visitors but for the address under which the server is reached, which Gradio writes into them.
So they are rendered once for an address that nobody has, and each visitor gets them with the address of their own in
its place. With a login the page holds the visitor's name, so there is no cache then.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import parse_qsl

import anyio

from comparator.ui.gradio_compat import CONFIG_PATH, server_root

_NOBODY = b"address-of-nobody.invalid"
_ADDRESSES = 16  # whose pages are kept: whoever asks chooses the Host header
_ANY_PAGE, _FIRST_PAGE = (
    "",
    "page=",
)  # what a request for the configuration may ask for; this app has one page


@dataclass(frozen=True)
class _Answer:
    content_type: bytes
    plain: bytes
    zipped: bytes


class PageCache:
    """ASGI middleware, innermost: whoever may not see the page has been refused before."""

    def __init__(self, app):
        self.app = app
        self._rendered: dict[tuple[str, str], tuple[bytes, bytes, str] | None] = {}
        self._answers: OrderedDict[tuple[str, str, str], _Answer] = OrderedDict()
        self._lock = asyncio.Lock()  # of the rendering: many visitors come at once when a link is sent round

    async def __call__(self, scope, receive, send) -> None:
        answer = await self._answer(scope) if _is_page(scope) else None
        if answer is None:
            await self.app(scope, receive, send)
            return
        zipped = any(n == b"accept-encoding" and b"gzip" in v.lower() for n, v in scope["headers"])
        body = answer.zipped if zipped else answer.plain
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", str(len(body)).encode()),
            (b"vary", b"accept-encoding"),
            *([(b"content-encoding", b"gzip")] if zipped else []),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope) -> _Answer | None:
        """None where Gradio itself has to answer."""
        what = (scope["path"].rstrip("/"), _page_asked(scope))
        root = server_root(scope)
        if root is None:
            return None
        key = (*what, root)
        if key not in self._answers:
            async with self._lock:
                if key not in self._answers:
                    rendered = await self._render(scope, what)
                    if rendered is None:
                        return None
                    self._answers[key] = await anyio.to_thread.run_sync(_addressed, rendered, root)
                    if len(self._answers) > _ADDRESSES:
                        self._answers.popitem(last=False)
        self._answers.move_to_end(key)
        return self._answers[key]

    async def _render(self, scope, what: tuple[str, str]) -> tuple[bytes, bytes, str] | None:
        """Content type, body, and the root in it; None where Gradio answers anything but the page."""
        if what not in self._rendered:
            nobody = {
                **scope,
                "method": "GET",
                "scheme": "http",
                "query_string": what[1].encode(),
                "headers": [(b"host", _NOBODY)],
            }
            status, content_type, body = 500, b"", b""

            async def receive():
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message) -> None:
                nonlocal status, content_type, body
                if message["type"] == "http.response.start":
                    status = message["status"]
                    content_type = dict(message["headers"]).get(b"content-type", b"")
                else:
                    body += message.get("body", b"")

            await self.app(nobody, receive, send)
            if status != 200:
                return None
            self._rendered[what] = (content_type, body, server_root(nobody))
        return self._rendered[what]


def _is_page(scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and scope["path"].rstrip("/") in ("", CONFIG_PATH)
    )


def _page_asked(scope) -> str:
    """The part of the query that the answer depends on. Names of other pages are passed over as Gradio does it, and
    links into Gradio's own saved states, which this app does not make, cost nothing."""
    if not scope["path"].startswith(CONFIG_PATH):
        return _ANY_PAGE
    query = scope.get("query_string", b"")[:2000].decode("latin-1")
    return _FIRST_PAGE if ("page", "") in parse_qsl(query, keep_blank_values=True) else _ANY_PAGE


def _addressed(rendered: tuple[bytes, bytes, str], root: str) -> _Answer:
    """The answer with this root in it, escaped as Gradio escapes JSON in a page."""
    content_type, body, nobody = rendered
    body = body.replace(_json(nobody), _json(root))
    return _Answer(content_type, body, gzip.compress(body, 6))


def _json(text: str) -> bytes:
    escaped = json.dumps(text)[1:-1]
    for sign in "<>&'":
        escaped = escaped.replace(sign, f"\\u{ord(sign):04x}")
    return escaped.encode()
