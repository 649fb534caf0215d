"""One server with OpenAI's API: what it says of itself, how far away it is, and answers as they stream.

Every request runs on a thread of its own, so that Stop is heard while the server is silent, and so that times are those
at which something arrived. Imports openai, so it is imported where a server is used.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai

from comparator.core.endpoints import Endpoint
from comparator.core.errors import Stopped, UserError
from comparator.runtimes.endpoint import problems
from comparator.runtimes.endpoint.transport import Guarded
from comparator.util import streams

POLL_S = 0.02  # how often Stop is looked at
ASIDE_S = 3.0  # for what a server may say of itself beside OpenAI's API
PINGS = 5


class Client:
    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.transport = Guarded(endpoint)
        timeout = httpx2.Timeout(problems.READ_S, connect=problems.CONNECT_S)
        self._http = httpx2.Client(
            transport=self.transport, timeout=timeout, follow_redirects=False, trust_env=False
        )
        # The transport sets the key. Without one given, the SDK would read OpenAI's own from the environment.
        self._api = openai.OpenAI(
            base_url=endpoint.url, api_key="unused", http_client=self._http, timeout=timeout, max_retries=0
        )

    def close(self) -> None:
        self.transport.abort()
        self._http.close()

    # ------------------------------------------------------------ requests

    def models(self, cancel: threading.Event) -> list[dict[str, Any]]:
        """The entries of /models."""
        answer = self._wait(lambda: self._api.get("/models", cast_to=object), cancel)
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise problems.not_the_api(self.endpoint)
        return [e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)]

    def aside(self, path: str, cancel: threading.Event, body: dict | None = None) -> dict[str, Any]:
        """What a server says outside of OpenAI's API, at a path below its host; {} where it says nothing."""
        url = self._beside(path)

        def ask() -> Any:
            answer = (
                self._http.get(url, timeout=ASIDE_S)
                if body is None
                else self._http.post(url, json=body, timeout=ASIDE_S)
            )
            return answer.json() if answer.status_code == 200 else {}

        try:
            answer = self._wait(ask, cancel)
        except UserError:
            return {}
        return answer if isinstance(answer, dict) else {}

    def round_trip_s(self, cancel: threading.Event) -> float | None:
        """Median of a few small requests over the open connection: the network, and a server's least work. Any answer
        will do, since not every server knows the path. None where there is none."""
        url = self._beside("/health")

        def ping() -> float:
            start_s = time.perf_counter()
            self._http.get(url)
            return time.perf_counter() - start_s

        def work() -> float:
            ping()  # may have to open the connection
            return statistics.median(ping() for _ in range(PINGS))

        try:
            return self._wait(work, cancel)
        except UserError:
            return None  # the request itself will say what is wrong

    def ask(self, body: dict[str, Any], cancel: threading.Event) -> dict[str, Any]:
        """A whole answer at once. `body` with "messages" goes to /chat/completions, else to /completions."""
        answer = self._wait(lambda: self._api.post(_path(body), body=body, cast_to=object), cancel)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise problems.not_the_api(self.endpoint)
        return answer

    def stream(self, body: dict[str, Any], cancel: threading.Event) -> Iterator[tuple[float, dict[str, Any]]]:
        """The pieces of an answer, each with the `time.perf_counter()` at which it arrived; ends soon after `cancel`.

        The first item, before any piece, is (time at which the request was sent, {}).
        """
        pieces: queue.SimpleQueue = queue.SimpleQueue()

        def read() -> None:
            pieces.put((time.perf_counter(), {}))
            stream = self._api.post(
                _path(body), body={**body, "stream": True}, cast_to=object, stream=True,
                stream_cls=openai.Stream[object],
            )  # fmt: skip
            with stream:
                for piece in stream:
                    pieces.put((time.perf_counter(), piece))

        future = streams.in_thread(read, "endpoint")
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while not cancel.is_set():
                try:
                    item = pieces.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if item is None:
                    break
                if not isinstance(item[1], dict):
                    raise problems.not_the_api(self.endpoint)
                yield item
        finally:
            if not future.done():
                self.transport.abort()
        if not cancel.is_set():
            self._result(future)

    def _beside(self, path: str) -> httpx2.URL:
        return httpx2.URL(self.endpoint.url).copy_with(raw_path=path.encode())

    def _wait(self, work: Callable[[], Any], cancel: threading.Event) -> Any:
        """The result of `work`, run on a thread. Raises `Stopped` at Stop."""
        future = streams.in_thread(work, "endpoint")
        while True:
            if cancel.is_set():
                self.transport.abort()
                raise Stopped
            try:
                future.exception(POLL_S)
            except TimeoutError:
                continue
            return self._result(future)

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:
            raise problems.explain(error, self.endpoint) from None


def _path(body: dict[str, Any]) -> str:
    return "/chat/completions" if "messages" in body else "/completions"
