"""Who has the engine: first come, first served, with what those who are queued learn meanwhile."""

from __future__ import annotations

import contextvars
import queue
import threading
import time

import pytest

from comparator.core.errors import Stopped
from comparator.engine.queue import FairQueue, asked_by


class Visitor:
    """A thread that takes a turn and keeps it until `done` is set."""

    def __init__(self, turns: FairQueue, name: str, order: list[str]):
        self.statuses: queue.SimpleQueue = queue.SimpleQueue()
        self.done, self.has_turn = threading.Event(), threading.Event()

        def visit() -> None:
            with turns.turn(threading.Event(), lambda *s: self.statuses.put(s), lambda: f"{name} runs"):
                order.append(name)
                self.has_turn.set()
                self.done.wait()

        self.thread = threading.Thread(target=contextvars.copy_context().run, args=(visit,), daemon=True)
        self.thread.start()


def test_first_come_first_served_and_those_who_wait_are_told():
    turns, order = FairQueue(), []
    first = Visitor(turns, "first", order)
    assert first.has_turn.wait(10)
    second = Visitor(turns, "second", order)
    assert second.statuses.get(timeout=10) == (1, "first runs")
    third = Visitor(turns, "third", order)
    assert third.statuses.get(timeout=10) == (2, "first runs")
    assert turns.busy and turns.waiting == 2 and turns.doing == "first runs"
    first.done.set()
    assert third.statuses.get(timeout=10) == (1, "second runs"), "a change ahead was not reported"
    second.done.set()
    assert third.has_turn.wait(10)
    third.done.set()
    for visitor in (first, second, third):
        visitor.thread.join(10)
    assert order == ["first", "second", "third"] and not turns.busy


def test_stop_leaves_the_queue():
    turns, cancel = FairQueue(), threading.Event()
    with turns.turn(threading.Event()):
        with pytest.raises(Stopped), turns.turn(cancel, lambda *_: cancel.set()):
            pytest.fail("it got the device, which another had")
        assert turns.waiting == 0, "whoever was stopped is still queued"
    assert not turns.busy


def test_visitors_take_turns_whatever_one_of_them_queues():
    turns, order, there = FairQueue(), [], {}
    for number, name in enumerate(("a1", "a2", "a3", "b1", "b2", "c1"), 1):
        with asked_by(name[0]):
            there[name] = Visitor(turns, name, order)
        until = time.monotonic() + 10
        while turns.waiting + 1 < number and time.monotonic() < until:
            time.sleep(0.002)
    assert turns.of("a") == 3 and turns.waiting == 5
    wanted = ["a1", "b1", "c1", "a2", "b2", "a3"]
    for name in wanted:
        assert there[name].has_turn.wait(10), f"{order} had turns; one visitor's requests come before others'"
        there[name].done.set()
        there[name].thread.join(10)
    assert order == wanted and not turns.busy
