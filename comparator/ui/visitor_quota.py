"""How much one visitor may send to a public server: requests and bytes in a minute, bytes of uploads in an hour, and all
uploads.

Uploaded files lie on the disk for an hour (`build.FILES_MAX_AGE_S`), so what was received within the last hour is what
is there. Judges heads and counts bytes; keeps a few numbers per visitor.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque

from comparator.core.settings import Settings
from comparator.deploy.limits import visitor
from comparator.ui.gradio_compat import UPLOAD_PATH

POSTS_PER_MINUTE = 600  # a page that is used sends some ten for a click, and one a second while it trains
BYTES_PER_MINUTE = (
    40_000_000  # without uploads; a form has some kB, and 4 MB with the longest calibration text
)
UPLOADS_EACH = 4  # times the largest upload, in an hour
UPLOAD_BYTES_TOTAL = 1_000_000_000  # in an hour, of everybody
HOUR_S = 3600.0
_MOST_VISITORS = 10_000


class VisitorQuota:
    """ASGI middleware for public mode; answers 429."""

    def __init__(self, app, settings: Settings, most_body: int = 0):
        self.app, self.settings, self.most_body = app, settings, most_body
        self._posts: OrderedDict[str, tuple[float, int, int]] = (
            OrderedDict()
        )  # start of the minute, how many, bytes
        self._uploads: deque[tuple[float, str, int]] = deque()
        self._lock = threading.Lock()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope.get("headers", ())}
        who = visitor(headers, (scope.get("client") or (None,))[0], self.settings)
        uploading = scope["path"].rstrip("/").endswith(UPLOAD_PATH)
        length = headers.get("content-length", "")
        # Without a length it may turn out to be as large as it can be.
        most = self.settings.max_upload_bytes if uploading else self.most_body
        size = int(length) if length.isascii() and length.isdigit() else most
        if not self._count(who, 0 if uploading else size) or (uploading and not self._take(who, size)):
            await refuse(send)
            return
        await self.app(scope, receive, send)

    def _count(self, who: str, size: int) -> bool:
        now_s = time.monotonic()
        with self._lock:
            since_s, count, total = self._posts.pop(who, (now_s, 0, 0))
            if now_s - since_s > 60:
                since_s, count, total = now_s, 0, 0
            self._posts[who] = (since_s, count + 1, total + size)
            while len(self._posts) > _MOST_VISITORS:
                self._posts.popitem(last=False)
        return count < POSTS_PER_MINUTE and total + size <= BYTES_PER_MINUTE

    def _take(self, who: str, size: int) -> bool:
        """Whether so many bytes may be uploaded; then they count, whether or not they arrive."""
        now_s = time.monotonic()
        with self._lock:
            while self._uploads and now_s - self._uploads[0][0] > HOUR_S:
                self._uploads.popleft()
            own = sum(s for _, name, s in self._uploads if name == who)
            total = sum(s for _, _, s in self._uploads)
            if (
                own + size > UPLOADS_EACH * self.settings.max_upload_bytes
                or total + size > UPLOAD_BYTES_TOTAL
            ):
                return False
            self._uploads.append((now_s, who, size))
            return True


async def refuse(send) -> None:
    body = b'{"detail": "You have sent more than this server takes from one visitor. Try again later."}'
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"60"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})
