"""What the page's address asks for, without a browser: a link fills in the form and looks nothing up."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr

from comparator.core.request import BUILTIN_MODEL
from comparator.core.settings import Settings
from comparator.ui import links, prefill
from comparator.ui.build import build_ui
from comparator.ui.panel.model import LINKED


def visitor(query: str) -> SimpleNamespace:
    return SimpleNamespace(request=SimpleNamespace(url=SimpleNamespace(query=query)))


def listener(demo: gr.Blocks, name: str):
    """The function whose only output is the component of this id."""
    component = next(c for c in demo.blocks.values() if getattr(c, "elem_id", None) == name)
    return next(f.fn for f in demo.fns.values() if [o._id for o in f.outputs] == [component._id])


def test_what_a_link_names_is_not_looked_up_before_run(tmp_path, monkeypatch):
    pages: list = []
    wire = links.wire
    monkeypatch.setattr(links, "wire", lambda page, demo: (pages.append(page), wire(page, demo)))
    demo = build_ui(Settings(data_dir=tmp_path))
    (page,) = pages
    values = links.arrived(page, visitor("model=someone/model&v=bf16&a=someone/lora*0.5&a=pirate"))
    assert len(values) == len(links.saved_comparison.outputs(page)) + len(prefill.outputs(page)) + 1
    assert set(values[-1]) == {"someone/model", "someone/lora*0.5"}, (
        "pirate is built in: it costs nothing to look up"
    )

    def refuse(*_, **__):
        raise AssertionError("a link made the server look something up")

    monkeypatch.setattr("comparator.ui.panel.adapters.open_adapter", refuse)
    monkeypatch.setattr("comparator.ui.panel.model.describe", refuse)
    assert LINKED in page.describe(None, "someone/model", values[-1])
    describe_adapters = listener(demo, "adapter-facts")
    assert LINKED in describe_adapters(None, ["someone/lora*0.5"], "someone/model", values[-1])
    own = links.arrived(page, visitor(f"model={BUILTIN_MODEL}&v=bf16"))
    assert own[-1] == ()
