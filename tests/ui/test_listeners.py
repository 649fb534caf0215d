"""Who still waits for an answer of the API, and that a comparison nobody waits for ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import pytest

from comparator.core.errors import UserError
from comparator.core.events import Queued
from comparator.core.settings import Settings
from comparator.engine.queue import asked_by
from comparator.engines import get_engine
from comparator.ui import api, listeners
from comparator.ui.admission import Admission
from comparator.ui.gradio_compat import CALL_PATH, HEARTBEAT_PATH, STREAM_PATH
from comparator.ui.listeners import Listeners, Listening


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(listeners.time, "monotonic", lambda: now.s)
    return now


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (f"{CALL_PATH}compare/abc", b""),
        (f"/under{CALL_PATH}v2/compare/abc", b""),
        (STREAM_PATH, b"session_hash=abc"),
    ],
)
def test_a_reader_is_there_while_its_request_lasts(path, query, clock):
    known, seen = Listeners(), []

    async def app(scope, receive, send):
        seen.append(known.hung_up("abc", since_s=100.0))

    clock.s = 150.0
    asked = {"type": "http", "method": "GET", "path": path, "query_string": query, "app": _app("abc")}
    thread = threading.Thread(target=asyncio.run, args=(Listening(app, known)(asked, None, None),))
    thread.start()
    thread.join(10)
    assert seen == [False] and not known.hung_up("abc", 100.0), "it may connect anew"
    clock.s += listeners.GONE_S + 1
    assert known.hung_up("abc", 100.0) and not known.hung_up("other", 150.0)
    assert not known.hung_up("abc", clock.s), (
        "a second call of a session is held against the first one's reader"
    )


def _app(*sessions: str) -> SimpleNamespace:
    """An app that has messages for these sessions."""
    queue = SimpleNamespace(pending_messages_per_session=dict.fromkeys(sessions))
    return SimpleNamespace(get_blocks=lambda: SimpleNamespace(_queue=queue))


def test_an_invented_session_gets_gradios_answer_and_no_traceback_in_the_log():
    sent = []

    async def app(scope, receive, send):
        raise AssertionError("Gradio would log a traceback")

    async def send(message):
        sent.append(message)

    asked = {"type": "http", "method": "GET", "path": STREAM_PATH, "query_string": b"session_hash=x"}
    known = Listeners()
    thread = threading.Thread(
        target=asyncio.run, args=(Listening(app, known)({**asked, "app": _app("abc")}, None, send),)
    )
    thread.start()
    thread.join(10)
    message = json.loads(sent[1]["body"].decode().removeprefix("data: "))
    assert sent[0]["status"] == 200 and message["session_not_found"] and not known._readers


def test_whoever_never_reads_is_given_a_minute(clock):
    known = Listeners()
    assert not known.hung_up("abc", 100.0) and not known.hung_up(None, 0.0)
    clock.s += listeners.NEVER_CAME_S + 1
    assert known.hung_up("abc", 100.0)


def test_sessions_of_the_past_are_forgotten():
    known = Listeners()
    for number in range(listeners._MOST + 100):
        known.note(str(number), 1)
    assert len(known._readers) == listeners._MOST


def test_a_session_is_over_when_its_page_is_closed_for_an_hour_or_never_came(clock):
    pages, during = Listeners(), []

    async def app(scope, receive, send):
        clock.s += 10_000
        during.append(pages.is_over("abc", idle_s=10_000))

    asked = {"type": "http", "method": "GET", "path": f"{HEARTBEAT_PATH}abc", "query_string": b""}
    thread = threading.Thread(
        target=asyncio.run, args=(Listening(app, Listeners(), pages)(asked, None, None),)
    )
    thread.start()
    thread.join(10)
    assert during == [False], "an open page nobody touched for hours lost what belongs to it"
    clock.s += listeners.CLOSED_S - 1
    assert not pages.is_over("abc", idle_s=20_000), "a laptop may sleep"
    clock.s += 2
    assert pages.is_over("abc", idle_s=20_000) and not pages.is_over("abc", idle_s=5)
    assert pages.is_over("invented", listeners.NEVER_OPENED_S + 1) and not pages.is_over("new", 5)


def test_a_program_that_hung_up_leaves_the_queue(monkeypatch, tmp_path):
    monkeypatch.setattr(listeners, "NEVER_CAME_S", 0.2)
    desk, asker = (
        Admission(Settings(data_dir=tmp_path)),
        SimpleNamespace(session_hash="abc", request=object()),
    )
    request, queue = api.build_request("Hi", ["bf16"], fidelity="none", max_new_tokens=1), get_engine().queue
    said: list = []

    def call() -> None:
        try:
            asyncio.run(api._followed(desk, request, asker))
        except Exception as error:
            said.append(error)

    with asked_by("somebody"), queue.turn(threading.Event()):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(20)
        assert not thread.is_alive() and queue.waiting == 0, (
            "a program that hung up keeps its place in the queue"
        )


def test_a_comparison_ends_after_its_time_on_the_device(tmp_path, monkeypatch):
    desk = Admission(Settings(data_dir=tmp_path, max_comparison_s=1))
    stop, began = threading.Event(), time.monotonic()

    def run(request, engine, cancel, emit):
        emit(Queued(1, ""))
        time.sleep(1.2)
        assert not cancel.is_set(), "the time in the queue counts"
        emit(object())
        assert cancel.wait(20)

    monkeypatch.setattr("comparator.ui.admission.zerogpu_runner.run", run)
    desk.run(api.build_request("Hi", ["bf16"]), None, stop, lambda event: None)
    assert stop.is_set() and time.monotonic() - began < 20


def test_a_comparison_that_is_queued_too_long_is_refused(tmp_path):
    desk = Admission(Settings(data_dir=tmp_path, max_wait_s=1))
    events: list = []
    with asked_by("somebody"), get_engine().queue.turn(threading.Event()):
        with pytest.raises(UserError, match="COMPARATOR_MAX_WAIT_S"):
            desk.run(api.build_request("Hi", ["bf16"]), None, threading.Event(), events.append)
    assert get_engine().queue.waiting == 0 and all(isinstance(event, Queued) for event in events)


def test_one_visitor_does_not_fill_the_queue(tmp_path, monkeypatch):
    desk = Admission(Settings(data_dir=tmp_path, public=True, queue_size=10))
    request, queue = api.build_request("Hi", ["bf16"]), get_engine().queue
    monkeypatch.setattr(queue, "of", lambda visitor: 2 if visitor == "10.0.0.1" else 0)
    asker = SimpleNamespace(headers={}, client=SimpleNamespace(host="10.0.0.1"))
    with pytest.raises(Exception, match="per visitor"):
        desk.admit(request, asker)
    desk.admit(request, SimpleNamespace(headers={}, client=SimpleNamespace(host="10.0.0.2")))
