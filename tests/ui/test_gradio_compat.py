"""The parts of Gradio that are not documented are still where comparator/ui/gradio_compat.py expects them."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.state_holder import SessionState, StateHolder

from comparator.core.settings import Settings
from comparator.ui import gradio_compat as compat


def test_event_data_is_what_the_browser_sent():
    with gr.Blocks():
        box = gr.HTML("")
    assert compat.event_data(gr.EventData(box, {"id": "x"})) == {"id": "x"}, (
        "gr.EventData keeps its payload elsewhere now"
    )


def test_the_blocks_being_built_are_known():
    with gr.Blocks() as demo:
        assert compat.current_blocks() is demo, "Gradio keeps the Blocks under construction elsewhere now"


def test_uploads_and_the_start_are_where_the_guard_expects_them():
    from starlette.testclient import TestClient

    with gr.Blocks() as demo:
        pass
    demo.max_file_size = None  # which `launch` sets
    browser = TestClient(gr.routes.App.create_app(demo))
    sent = browser.post(compat.UPLOAD_PATH, files={"files": ("a.txt", b"content")})
    assert sent.status_code == 200 and len(sent.json()) == 1, (
        "uploads would get the small limit of other requests"
    )
    assert browser.get(compat.STARTUP_PATH).status_code == 200, (
        "with a token the app's own start would be refused"
    )


def test_the_queue_has_the_two_intervals():
    with gr.Blocks() as demo:
        pass
    demo.queue()
    before = vars(demo._queue).copy()
    compat.poll_queue(demo, idle_s=0.125, progress_s=0.5)
    changed = {name for name, value in vars(demo._queue).items() if value != before.get(name, None)}
    assert changed == {"sleep_when_free", "progress_update_sleep_when_free"}, (
        "an interval is a new attribute: Gradio's queue reads it under another name now"
    )
    assert changed <= set(before), (
        "Gradio's queue no longer has these intervals, so setting them does nothing"
    )


def test_a_new_session_keeps_nothing_of_the_components(monkeypatch):
    """Invented sessions cost the event loop nothing, and a shown document is not kept once more."""
    monkeypatch.setattr(SessionState, "__init__", SessionState.__init__)
    with gr.Blocks() as demo:
        box, state = gr.Textbox("x"), gr.State(["y"])
    compat.keep_no_configs()
    session = SessionState(demo)
    session._update_value_in_config(box._id, "z" * 1000)
    session[box._id] = gr.Textbox("w")
    session._update_config(box._id)
    session._update_value_in_config(box._id, "z" * 1000)
    assert session.config_values.keys() <= {box._id} and "z" not in str(session.config_values), (
        "Gradio keeps a session's configs elsewhere now"
    )
    assert session[state._id] == ["y"] and session[box._id].value == "w"


def test_sessions_are_forgotten_whole():
    with gr.Blocks() as demo:
        box, state = gr.Textbox("x"), gr.State(["y"])
    holder = StateHolder()
    demo.state_session_capacity = 10
    holder.set_blocks(demo)
    compat.keep_no_configs()
    for session in ("open", "invented"):
        holder[session][state._id] = ["z"]
        holder[session][box._id] = gr.Textbox("w")
    compat.forget_sessions(lambda session, idle_s: session == "invented" and idle_s < 60)
    holder.delete_all_expired_state()
    assert list(holder.session_data) == list(holder.time_last_used) == ["open"]
    assert holder["open"][state._id] == ["z"]
    compat.forget_sessions(lambda session, idle_s: False)  # as others of this process find it


def test_outputs_that_are_skipped_are_left_alone():
    """Gradio makes a new component for each, which took the event loop 20 ms for a link that opens."""
    with gr.Blocks() as demo:
        box, other, state = gr.Textbox("x"), gr.Number(1), gr.State(["y"])
        for outputs in ([box, other, state], [box, other]):
            box.change(lambda: None, outputs=outputs)
    three, two = demo.fns.values()
    plain = demo.postprocess_data
    compat.skip_at_no_cost(demo)
    for fn, values in [
        (three, [gr.skip(), 2, gr.skip()]),
        (three, [gr.update(label="new"), gr.skip(), ["z"]]),
        (two, (gr.skip(), gr.skip())),
        (two, gr.skip()),
    ]:
        own, gradios = SessionState(demo), SessionState(demo)
        with ThreadPoolExecutor(1) as thread:  # a browser test may have left an event loop in this one
            sent = thread.submit(asyncio.run, demo.postprocess_data(fn, values, own)).result()
            expected = thread.submit(asyncio.run, plain(fn, values, gradios)).result()
        assert sent == expected and own[state._id] == gradios[state._id]
        assert own[box._id].label == gradios[box._id].label
    assert own[other._id] is other or values == gr.skip(), "a component was made anew"


def test_a_choice_that_is_gone_reaches_the_handler():
    with gr.Blocks():
        plain = gr.Dropdown(["a"])
        own = compat.unchecked("Own", gr.Dropdown, lambda value: value)(["a"])
    with pytest.raises(gr.Error):
        plain.preprocess("b")
    assert own.preprocess("b") == "b", (
        "the component calls something else than `preprocess` on what the browser sends"
    )
    assert own.get_block_name() == "dropdown", "the browser would look for a component that does not exist"


def test_a_visitors_login_is_read_from_the_session_while_it_is_valid():
    from starlette.requests import Request

    def asker(**info):
        session = {"oauth_info": {"access_token": "hf_own", **info}} if info else {}
        return gr.Request(Request({"type": "http", "headers": [], "session": session}))

    assert compat.visitors_login(asker(expires_at=time.time() + 60)) == "hf_own", (
        "Gradio keeps a visitor's login elsewhere now"
    )
    assert compat.visitors_login(asker(expires_at=time.time() - 1)) is None
    assert compat.visitors_login(asker()) is None and compat.visitors_login(None) is None


def test_the_login_button_is_there_where_the_hub_knows_this_app(monkeypatch):
    """Anywhere else Gradio's button would log every visitor in as the operator."""
    from comparator.core.settings import Settings
    from comparator.sources import hub_login
    from comparator.ui.page import Page
    from comparator.ui.panel import header

    def buttons() -> int:
        with gr.Blocks() as demo:
            header.build(Page(Settings(), None))
        return sum(isinstance(block, gr.LoginButton) for block in demo.blocks.values())

    monkeypatch.setattr(hub_login, "get_settings", lambda: Settings(public=True))
    monkeypatch.setattr(hub_login, "find_spec", lambda name: object())
    monkeypatch.setattr(gr.routes, "attach_oauth", lambda app: None)  # its libraries are on Spaces only
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert buttons() == 0
    monkeypatch.setenv("OAUTH_CLIENT_ID", "client")
    assert buttons() == 0
    monkeypatch.setenv("SPACE_ID", "someone/space")
    assert buttons() == 1
    monkeypatch.setattr(hub_login, "find_spec", lambda name: None)
    assert buttons() == 0
    monkeypatch.setattr(hub_login, "find_spec", lambda name: object())
    monkeypatch.setattr(hub_login, "get_settings", lambda: Settings(public=False))
    assert buttons() == 0


def test_the_root_url_respects_a_proxy():
    from starlette.requests import Request

    scope = {
        "type": "http", "method": "POST", "path": "/gradio_api/queue/join", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"inner:7860"), (b"x-forwarded-host", b"example.org"), (b"x-forwarded-proto", b"https")],
        "server": ("inner", 7860), "scheme": "http", "app": SimpleNamespace(root_path=""),
    }  # fmt: skip
    assert compat.root_url(Request(scope)) == "https://example.org/", (
        "Gradio's `get_root_url` works differently now"
    )


def test_unread_answers_of_invented_sessions_push_out_nobody_who_reads():
    with gr.Blocks() as demo:
        pass
    demo.queue()
    compat.bound_unread(demo, 3, lambda session: session == "read")
    pending = demo._queue.pending_messages_per_session
    pending["read"] = "messages"
    events = [SimpleNamespace(alive=True) for _ in range(10)]
    for n in range(10):
        demo._queue.pending_event_ids_session[f"invented {n}"] = {n}
        demo._queue.event_ids_to_events[n] = events[n]
        pending[f"invented {n}"] = "messages"
    assert len(pending) == 3 and "read" in pending
    assert set(demo._queue.event_ids_to_events) == {8, 9}, "events of sessions that are gone stay"
    assert [n for n, event in enumerate(events) if event.alive] == [8, 9], (
        "Gradio would look for the messages of a session that is gone"
    )


def test_only_tabs_stand_beside_tabs():
    """Gradio counts every child of `gr.Tabs` when it labels those after it: a State among them gave one tab another's name."""
    from comparator.ui.build import build_ui

    for block in build_ui(Settings()).blocks.values():
        if isinstance(block, gr.Tabs):
            strays = [child for child in block.children if not isinstance(child, gr.Tab)]
            assert not strays, f"indent what builds {strays} so that it is in a tab"


def test_status_goes_to_one_component():
    from comparator.ui.build import build_ui

    listeners = build_ui(Settings()).get_config_file()["dependencies"]
    hidden = [each for each in listeners if each["show_progress"] == "hidden"]
    targets = {tuple(each["show_progress_on"] or ()) for each in hidden}
    assert len(hidden) > 100 and len(targets) == 1 and len(*targets) == 1, (
        "the browser walks through the page for each output of every event"
    )
