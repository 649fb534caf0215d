"""Work on another thread: what it emits, its errors and its end reach whoever started it."""

from __future__ import annotations

import contextvars
import threading

import pytest

from comparator.util import streams


def count_until(cancel: threading.Event, ended: threading.Event | None = None):
    """Work that emits 0, 1, 2 … until it is stopped, and then sets `ended`."""

    def work(emit) -> str:
        number = 0
        while not cancel.is_set():
            emit(number)
            number += 1
        if ended:
            ended.set()
        return "stopped"

    return work


def test_callbacks_come_on_the_calling_thread_and_the_result_is_returned():
    threads, numbers = set(), []

    def callback(number: int) -> None:
        threads.add(threading.current_thread())
        numbers.append(number)

    result = streams.follow(lambda emit: [emit(n) for n in range(5)] and "done", callback, threading.Event())
    assert (result, numbers) == ("done", [0, 1, 2, 3, 4])
    assert threads == {threading.current_thread()}


def test_an_error_of_the_work_is_raised_after_what_it_emitted():
    numbers = []

    def work(emit) -> None:
        emit(1)
        raise KeyError("broken")

    with pytest.raises(KeyError):
        streams.follow(work, numbers.append, threading.Event())
    with pytest.raises(KeyError):
        for number in streams.iterate(work, threading.Event()):
            numbers.append(number)
    assert numbers == [1, 1]


def test_an_error_of_the_callback_stops_the_work_and_waits_for_it():
    cancel, ended = threading.Event(), threading.Event()
    with pytest.raises(ZeroDivisionError):
        streams.follow(count_until(cancel, ended), lambda number: 1 / 0, cancel)
    assert ended.is_set(), "the work goes on after its reader has failed"


def test_closing_an_iterator_stops_the_work_and_waits_for_it():
    cancel, ended = threading.Event(), threading.Event()
    numbers = streams.iterate(count_until(cancel, ended), cancel)
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    numbers.close()
    assert ended.is_set(), "the work goes on after its iterator was closed"


def test_an_iterator_that_is_not_read_does_not_run_ahead():
    emitted = []

    def work(emit) -> None:
        for number in range(3):
            emitted.append(number)
            emit(number)

    numbers = streams.iterate(work, threading.Event())
    assert emitted == [], "it began before the first item was asked for"
    assert next(numbers) == 0 and emitted == [0]
    assert list(numbers) == [1, 2]


def test_several_threads_may_emit():
    def work(emit) -> None:
        streams.at_once([lambda n=n: [emit(n) for _ in range(50)] for n in range(4)], threading.Event())

    items = list(streams.iterate(work, threading.Event()))
    assert sorted(items) == sorted([n for n in range(4) for _ in range(50)])


def test_at_once_runs_side_by_side_and_raises_the_first_error_after_all_have_ended():
    meeting, cancel, ended = threading.Barrier(2), threading.Event(), threading.Event()

    def fails() -> None:
        meeting.wait(10)
        raise KeyError("broken")

    def goes_on() -> None:
        meeting.wait(10)
        assert cancel.wait(10), "the others were not told to stop"
        ended.set()

    with pytest.raises(KeyError):
        streams.at_once([fails, goes_on], cancel)
    assert ended.is_set(), "it did not wait for all of them"


def test_a_background_can_be_looked_at_without_waiting():
    go_on = threading.Event()

    def work(emit) -> str:
        emit(1, "a")
        emit(2, "b")
        assert go_on.wait(10)
        return "done"

    background = streams.Background(work)
    first = next(iter(background))
    assert first == (1, "a") and not background.ended
    go_on.set()
    assert background.future.result(10) == "done" and background.ended and background.error is None
    assert background.drain() == [(2, "b")]
    assert list(background) == [], "the end was lost by draining"


def test_waiting_calls_back_until_the_work_has_ended():
    calls, ready = [], threading.Event()

    def meanwhile() -> None:
        calls.append(True)
        ready.set()

    assert streams.wait(lambda: ready.wait(10), meanwhile, 0.01) is True and calls

    def stop() -> None:
        raise KeyboardInterrupt

    blocked = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        streams.wait(blocked.wait, stop, 0.01)
    blocked.set()
    with pytest.raises(TimeoutError, match="its own"):
        streams.wait(lambda: (_ for _ in ()).throw(TimeoutError("its own")), lambda: None, 0.5)


def test_context_variables_travel_along():
    visitor = contextvars.ContextVar("visitor", default="nobody")
    visitor.set("somebody")
    assert streams.in_thread(visitor.get).result(10) == "somebody"
