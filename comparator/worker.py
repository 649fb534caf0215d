"""One thread that does all of something, one piece after another. Knows nothing of torch or of models.

PyTorch's thread pools belong to the thread that started them: called from changing threads, the same decode
loop ran at half its speed on two cores.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Worker:
    """Safe to use from any thread but its own (waiting for itself would never end)."""

    def __init__(self, name: str = "engine"):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, work: Callable[[], Any]) -> Future:
        return self._thread.submit(work)

    def call(self, work: Callable[[], Any]) -> Any:
        """Run `work` there and wait for what it returns."""
        return self._thread.submit(work).result()

    def stream(self, work: Callable[[Callable[[Any], None]], Any], cancel: threading.Event) -> Iterator[Any]:
        """Run `work(emit)` there and yield what it emits, then what it returns.

        Closing the iterator sets `cancel` and waits until the work has really ended, so that whoever comes next
        finds the device free.
        """
        items: queue.SimpleQueue = queue.SimpleQueue()

        def job() -> None:
            try:
                items.put((False, work(lambda item: items.put((False, item)))))
                items.put((True, None))
            except BaseException as error:  # carried over to the caller's thread
                items.put((True, error))

        future = self._thread.submit(job)
        finished = False
        try:
            while not finished:
                finished, item = items.get()
                if not finished:
                    yield item
                elif item is not None:
                    raise item
        finally:
            if not finished:
                cancel.set()
                future.result()
