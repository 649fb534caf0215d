"""The HTTP connections to one server: no redirects, limits on time and size, and a way to cut them at Stop.

Imports httpx2, so it is imported where a server is used.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import certifi
import httpx2

from comparator.core.endpoints import Endpoint
from comparator.runtimes.endpoint import problems


class Guarded(httpx2.BaseTransport):
    """What goes out is the request and this server's own key, whatever the client read from the environment."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        trusted = ssl.create_default_context()  # the system's authorities, and those of SSL_CERT_FILE
        trusted.load_verify_locations(certifi.where())
        self._inner = httpx2.HTTPTransport(verify=trusted, trust_env=False)
        self._sockets: list[socket.socket] = []
        self._aborts = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        headers = {"host", "accept", "content-type", "content-length"}
        for name in [name for name in request.headers if name.lower() not in headers]:
            del request.headers[name]
        request.headers["user-agent"] = "quant-comparator"
        request.headers["accept-encoding"] = "identity"  # sizes are limited as they arrive
        if key := self.endpoint.key:
            request.headers["authorization"] = f"Bearer {key}"
        request.extensions = {**request.extensions, "trace": self._trace}
        deadline = time.monotonic() + problems.TOTAL_S
        aborts = self._aborts
        try:
            response = self._inner.handle_request(request)
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
            if self._aborts != aborts:
                raise
            # Most likely an idle connection that the server ended just now: nothing of an answer had arrived.
            response = self._inner.handle_request(request)
        if 300 <= response.status_code < 400:
            response.close()
            raise problems.redirected(self.endpoint, response.status_code)
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise problems.not_the_api(self.endpoint)
        response.stream = _Limited(response.stream, deadline, self.endpoint)
        return response

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets = [s for s in self._sockets if s.fileno() >= 0]
            self._sockets.append(info["return_value"].get_extra_info("socket"))

    def abort(self) -> None:
        """Cut the connections, so that a thread that reads from one ends and the server stops computing."""
        self._aborts += 1
        for known in self._sockets:
            with contextlib.suppress(OSError, ValueError):
                known.shutdown(socket.SHUT_RDWR)
        self._sockets = []

    def close(self) -> None:
        self._inner.close()


class _Limited(httpx2.SyncByteStream):
    """The bytes of an answer, as long as they keep to the limits."""

    def __init__(self, inner: Any, deadline: float, endpoint: Endpoint):
        self._inner, self._deadline, self._endpoint = inner, deadline, endpoint

    def __iter__(self) -> Iterator[bytes]:
        line = total = 0
        for part in self._inner:
            total += len(part)
            end = part.rfind(b"\n")
            line = line + len(part) if end < 0 else len(part) - end - 1
            if line > problems.MAX_LINE or len(part) > problems.MAX_LINE:
                raise problems.line_too_long(self._endpoint)
            if total > problems.MAX_BYTES:
                raise problems.too_much(self._endpoint)
            if time.monotonic() > self._deadline:
                raise problems.too_long(self._endpoint)
            yield part

    def close(self) -> None:
        self._inner.close()
