"""Work on another thread: follow what it emits, with a callback or as an iterator; several at once.

Every helper raises the work's errors on the calling thread. If it ends early, it sets `cancel` and waits until the work
has ended, so that the device is free for the next task.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

Emit = Callable[..., None]
Submit = Callable[[Callable[[], Any]], Future]


def in_thread(work: Callable[[], Any], name: str = "work") -> Future:
    """Start `work` on a daemon thread of its own, with the caller's context variables."""
    future: Future = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # raised by `future.result()`
            future.set_exception(error)
        else:
            future.set_result(result)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name=name, daemon=True).start()
    return future


@contextlib.contextmanager
def stopped_after(seconds: float | None, cancel: threading.Event) -> Iterator[None]:
    """Sets `cancel` where the block takes longer than this; None: never."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, cancel.set)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Background:
    """`work(emit)` running on a thread; each `emit(*args)` becomes one tuple to read here.

    Args:
        work: called with `emit`, which any thread may call.
        submit: starts it; a new thread unless an executor's `submit` is passed.
    """

    def __init__(self, work: Callable[[Emit], Any], submit: Submit = in_thread):
        self._emitted: queue.SimpleQueue = queue.SimpleQueue()
        self.future = submit(lambda: work(lambda *args: self._emitted.put(args)))
        self.future.add_done_callback(lambda _: self._emitted.put(None))

    @property
    def ended(self) -> bool:
        return self.future.done()

    @property
    def error(self) -> BaseException | None:
        """The work's exception, or None. Waits for its end."""
        return self.future.exception()

    def __iter__(self) -> Iterator[tuple]:
        """Tuples as they are emitted, until the work has ended."""
        return iter(self._emitted.get, None)

    def drain(self) -> list[tuple]:
        """Tuples emitted since the last call; never waits."""
        items = [self._emitted.get() for _ in range(self._emitted.qsize())]
        if items and items[-1] is None:
            self._emitted.put(items.pop())  # the end marker, which `__iter__` waits for
        return items


def follow(
    work: Callable[[Emit], Any],
    callback: Callable[..., None],
    cancel: threading.Event,
    submit: Submit = in_thread,
) -> Any:
    """Run `work(emit)` on another thread and call `callback` with what it emits, on this one; returns the work's result.

    An error in `callback`, Ctrl-C included, stops the work.
    """
    background = Background(work, submit)
    try:
        for args in background:
            callback(*args)
    except BaseException:
        cancel.set()
        background.error  # noqa: B018 - waits; its own error is ignored
        raise
    try:
        return background.future.result()
    finally:
        del background  # an error would otherwise refer to itself through this frame, and keep tensors alive


def iterate(work: Callable[[Emit], Any], cancel: threading.Event) -> Iterator[Any]:
    """Yield what `work(emit)` emits from a thread that starts when the first item is requested.

    `emit` returns when the next item is requested, so the work never runs ahead of its reader.
    """
    next_requested = threading.Semaphore(0)

    def in_lockstep(emit: Emit) -> None:
        def emit_and_wait(item: Any) -> None:
            emit(item)
            next_requested.acquire()

        work(emit_and_wait)

    background = Background(in_lockstep)
    try:
        for (item,) in background:
            yield item
            next_requested.release()
    except GeneratorExit:
        cancel.set()
        next_requested.release()
        for _ in background:
            next_requested.release()
        raise
    background.future.result()


def at_once(works: Sequence[Callable[[], Any]], cancel: threading.Event) -> None:
    """Run all of them, one thread each, and wait for all. The first error sets `cancel` and is raised."""

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException:
            cancel.set()
            raise

    futures = [in_thread(lambda work=work: run(work)) for work in works]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


def wait(work: Callable[[], Any], meanwhile: Callable[[], None], every_s: float, name: str = "work") -> Any:
    """Run `work` on a thread and call `meanwhile` every `every_s` seconds until it has ended; returns its result.

    An error in `meanwhile` is raised at once; the work is abandoned.
    """
    future = in_thread(work, name)
    while True:
        try:
            return future.result(every_s)
        except TimeoutError:
            if future.done():
                return future.result()
            meanwhile()
