"""Whose login the Hub is asked with: this machine's own, and on a public server the visitor's or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.util import find_spec

from comparator.core.settings import get_settings

_visitors_token: ContextVar[str | None] = ContextVar("visitors_token", default=None)


@contextlib.contextmanager
def logged_in(token: str | None) -> Iterator[None]:
    """Inside, and in threads that are started inside, a public server asks the Hub with this visitor's own token."""
    before = _visitors_token.set(token)
    try:
        yield
    finally:
        _visitors_token.reset(before)


def login() -> str | bool | None:
    """`token=` for the Hub's client: in public mode the visitor's own or False, so that what a visitor names is asked for by
    nobody else; else None, this machine's own login. The operator's token opens private and gated repos, which are not
    the visitors'."""
    return (_visitors_token.get() or False) if get_settings().public else None


def logins_are_possible() -> bool:
    """Whether visitors log in to the Hub with their own accounts: on a public Space with `hf_oauth: true`, whose Gradio has
    the libraries for it."""
    on_space = bool(os.environ.get("SPACE_ID") and os.environ.get("OAUTH_CLIENT_ID"))
    return get_settings().public and on_space and all(map(find_spec, ("authlib", "itsdangerous")))
