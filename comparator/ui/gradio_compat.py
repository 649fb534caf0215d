"""Private parts of Gradio; written for Gradio 6.31. tests/ui/test_gradio_compat.py fails when one of them moves."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from copy import copy
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio.context import Context
from gradio.oauth import _get_valid_oauth_info_from_session
from gradio.route_utils import API_PREFIX, get_root_url
from gradio.state_holder import SessionState, StateHolder
from gradio.utils import LRUCache
from starlette.requests import Request

WRITTEN_FOR = "6.31"
UPLOAD_PATH = f"{API_PREFIX}/upload"  # where the browser sends files
CALL_PATH = f"{API_PREFIX}/call/"  # + endpoint, and to read the answer + the event's id, which is its session
STREAM_PATH = f"{API_PREFIX}/queue/data"  # where gradio_client reads answers, with ?session_hash=
HEARTBEAT_PATH = f"{API_PREFIX}/heartbeat/"  # + session, which a page reads for as long as it is open
CONFIG_PATH = "/config"  # what gradio_client reads first
STARTUP_PATH = f"{API_PREFIX}/startup-events"  # which `launch` asks for by HTTP


def event_data(event: gr.EventData) -> Any:
    """What the browser sent with an event of a gr.HTML: untrusted JSON data."""
    return event._data


def visitors_login(asker: Any) -> str | None:
    """The token of a visitor who has logged in with their own account of the Hub, while it is valid.

    Args:
        asker: a gr.Request, or None.
    """
    session = getattr(getattr(asker, "request", None), "scope", {}).get("session") or {}
    info = _get_valid_oauth_info_from_session(dict(session))
    return info.get("access_token") if info else None


def current_blocks() -> gr.Blocks:
    """The Blocks that is being built."""
    return Context.root_block


def poll_queue(demo: gr.Blocks, idle_s: float, progress_s: float) -> None:
    """How often the queue looks for new events, and for progress to send, in seconds; Gradio's own is 1 ms and 50 ms."""
    demo._queue.sleep_when_free = idle_s
    demo._queue.progress_update_sleep_when_free = progress_s


def keep_no_configs() -> None:
    """Have a session keep no config and last value of each component, which serve Gradio's own deep links alone.

    They took 50 ms of the event loop for every new session, which a stranger invents with one request, as much again
    for an event with many outputs, and 0.4 MB for as long as the session was kept, with each shown document once more.
    """
    if getattr(SessionState.__init__, "keeps_no_configs", False):
        return
    plain = SessionState.__init__

    def init(self, blocks: Any) -> None:
        plain(self, SimpleNamespace(default_config=blocks.default_config, blocks={}))
        self.blocks_config.config_for_block = lambda *arguments: {}  # the session's own copy

    init.keeps_no_configs = True
    SessionState.__init__ = init


def forget_sessions(is_over: Callable[[str, float], bool]) -> None:
    """Let go of whole sessions, each second.

    Gradio deletes the states of a session an hour after its page was closed. One that a program invented has no page that
    could be closed, and all else that belongs to a session stays until there are as many as it keeps.

    Args:
        is_over: called with a session and the seconds since its last event; whether it is forgotten.
    """
    plain = getattr(StateHolder.delete_all_expired_state, "plain", StateHolder.delete_all_expired_state)

    def delete_all_expired_state(self: StateHolder) -> None:
        plain(self)
        now = datetime.now()
        with self.lock:
            for session, last in list(self.time_last_used.items()):
                if is_over(session, (now - last).total_seconds()):
                    self.session_data.pop(session, None)
                    self.time_last_used.pop(session, None)

    delete_all_expired_state.plain = plain
    StateHolder.delete_all_expired_state = delete_all_expired_state


def show_no_progress(demo: gr.Blocks, on: Any) -> None:
    """Have listeners that show no progress report their status to one component, `on`, instead of to each of their outputs.

    At every event the browser hands its status to each component that was an output of any event so far, and walks through
    the whole page to find each of them: three of the four seconds in which a link opened.
    """
    for listener in demo.fns.values():
        if listener.show_progress == "hidden":
            listener.show_progress_on = [on]


def skip_at_no_cost(demo: gr.Blocks) -> None:
    """Leave outputs that are skipped alone: Gradio makes each of them again, 0.5 ms of the event loop apiece, and a link
    that opens skips fifty."""
    plain = demo.postprocess_data

    async def postprocess_data(block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        outputs = block_fn.outputs
        if (
            len(outputs) == 1
            or not isinstance(predictions, (list, tuple))
            or len(predictions) != len(outputs)
        ):
            return await plain(block_fn, predictions, state)
        changed = [n for n, value in enumerate(predictions) if not _is_skip(value)]
        sent: list[Any] = [None if block.stateful else gr.skip() for block in outputs]
        if changed:
            part = copy(block_fn)
            part.outputs = [outputs[n] for n in changed]
            values = [predictions[n] for n in changed]
            done = await plain(part, values if len(values) > 1 else values[0], state)
            for n, value in zip(changed, done, strict=True):
                sent[n] = value
        return sent

    demo.postprocess_data = postprocess_data


def _is_skip(value: Any) -> bool:
    return isinstance(value, dict) and value == gr.skip()


def root_url(request: Any) -> str:
    """The page's address as its visitor has it: through proxies, under a path, embedded in another page.

    Args:
        request: The Starlette request behind a gr.Request.

    Returns: The address, ending in a slash.
    """
    path = request.url.path
    route = path[path.rfind(API_PREFIX) :] if API_PREFIX in path else "/"
    return _root(request, route) + "/"


def server_root(scope: dict[str, Any]) -> str | None:
    """What Gradio writes as `root` into the page or the configuration that this request (an ASGI scope) asks for; None
    for a host that is no address."""
    path = scope["path"].rstrip("/")
    try:
        return _root(Request(scope), path if path == CONFIG_PATH else "/")
    except Exception:  # whatever httpx thinks of a stranger's Host header
        return None


def _root(request: Any, route: str) -> str:
    root_path = getattr(request.app, "root_path", "") or request.scope.get("root_path")
    return get_root_url(request, route, root_path)


def unchecked(name: str, base: type, clean: Callable[[Any], Any]) -> Any:
    """A subclass of the component `base` that accepts any choice the browser sends, passed through `clean`.

    The choices change with the comparison shown, so the browser may send one that is gone; Gradio would refuse it with
    an error that lists all of them. Created without the component metaclass's own step, which writes a .pyi file beside
    the module.
    """
    members = {
        "preprocess": lambda self, payload: clean(payload),
        "is_template": True,
        "__module__": __name__,
    }
    return ABCMeta.__new__(type(base), name, (base,), members)


def has_messages(scope: dict[str, Any], session: str) -> bool:
    """Whether there is anything to read for this session in the app that an ASGI request reached."""
    return session in scope["app"].get_blocks()._queue.pending_messages_per_session


class _Unread(LRUCache):
    """Messages to sessions. Beyond `max_size` sessions, those that nobody reads go first, the oldest of them."""

    def __init__(self, queue: Any, max_size: int, is_read: Callable[[str], bool]):
        super().__init__(max_size)
        self.queue, self.is_read = queue, is_read

    def __setitem__(self, session: str, messages: Any) -> None:
        while session not in self and len(self) >= self.max_size:
            oldest = next((s for s in self if not self.is_read(s)), next(iter(self)))
            del self[oldest]
        super().__setitem__(session, messages)

    def __delitem__(self, session: str) -> None:
        """Also drops the session's events: Gradio would end with a KeyError at their next message."""
        if session in self:
            super().__delitem__(session)
        for id in self.queue.pending_event_ids_session.pop(session, ()):
            event = self.queue.event_ids_to_events.pop(id, None)
            if event is not None:
                event.alive = False


def bound_unread(demo: gr.Blocks, most: int, is_read: Callable[[str], bool]) -> None:
    """At most `most` sessions have messages that wait to be read.

    Args:
        demo: after `queue()`.
        is_read: whether somebody reads the messages of a session.
    """
    demo._queue.pending_messages_per_session = _Unread(demo._queue, most, is_read)
