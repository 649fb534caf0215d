"""The page is rendered once, and everybody gets what Gradio itself would have sent them."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("gradio")

import gradio as gr
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from comparator.core.settings import Settings
from comparator.ui import page_cache
from comparator.ui.http_guard import middleware
from comparator.ui.page_cache import PageCache


@pytest.fixture
def browsers():
    """The same app asked with the cache and without."""

    with gr.Blocks(title="Rendered <once>") as demo:
        box = gr.Textbox("text", label="Label")
        box.change(lambda text: text, inputs=box, outputs=box, api_name="echo")
    demo.queue()

    def browser(*layers):
        app = gr.routes.App.create_app(demo, app_kwargs={"middleware": list(layers)})
        demo.config["body_css"] = {}  # `launch` fills it in
        return TestClient(app)

    return browser(Middleware(PageCache)), browser()


HEADERS = [
    {},
    {"host": "models.example.org:8000"},
    {"x-forwarded-host": "example.org", "x-forwarded-proto": "https"},
    {"host": "a\"b<c>&d'e.example.org"},
]


@pytest.mark.parametrize(
    "headers", HEADERS, ids=lambda h: h.get("host") or h.get("x-forwarded-host") or "plain"
)
@pytest.mark.parametrize(
    "path", ["/", "/?c=abc&__theme=dark", "/config", "/config?page=", "/config?page=x&deep_link=y"]
)
def test_the_answer_is_gradios_own(browsers, path, headers):
    ours, gradios = (browser.get(path, headers=headers) for browser in browsers)
    if gradios.status_code == 200:
        plain = browsers[0].get(path, headers=headers | {"accept-encoding": "identity"})
        assert _but_deep_links(ours.text) == _but_deep_links(gradios.text) and ours.text == plain.text
        assert ours.headers["content-type"] == gradios.headers["content-type"]
        assert ours.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    else:
        assert ours.status_code == gradios.status_code


def _but_deep_links(text: str) -> str:
    """Whether a link into Gradio's saved states is valid is not looked up: this app makes none."""
    return re.sub(r',"deep_link_state":"[a-z]+"', "", text)


def test_gradio_renders_once_whatever_hosts_and_links_are_asked_for(browsers, monkeypatch):
    renders = []
    plain = PageCache._render

    async def render(self, scope, what):
        if what not in self._rendered:
            renders.append(what)
        return await plain(self, scope, what)

    monkeypatch.setattr(PageCache, "_render", render)
    for number in range(3 * page_cache._ADDRESSES):
        for path in (f"/?c={number}", f"/config?deep_link={number}", "/config?page="):
            assert browsers[0].get(path, headers={"host": f"name{number}.example.org"}).status_code == 200
    assert len(renders) == 3
    cache = browsers[0].app.middleware_stack
    while not isinstance(cache, PageCache):
        cache = cache.app
    assert len(cache._answers) == page_cache._ADDRESSES, "invented hosts fill the memory"
    assert browsers[0].head("/").content == b""


def test_with_a_login_nothing_is_kept():
    def cached(**settings) -> bool:
        return any(layer.cls is PageCache for layer in middleware(Settings(**settings), None))

    assert cached() and cached(public=True) and not cached(auth="user:password")
    layers = [layer.cls.__name__ for layer in middleware(Settings(), "token")]
    assert layers.index("Token") < layers.index("PageCache"), "the page would be shown without the token"
