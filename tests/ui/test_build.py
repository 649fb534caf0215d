"""The page as it is put together, without a browser."""

from __future__ import annotations

import pytest

gr = pytest.importorskip("gradio")


def test_between_the_tabs_there_are_only_tabs():
    from comparator.ui.build import build_ui

    (tabs,) = [b for b in build_ui().blocks.values() if isinstance(b, gr.Tabs)]
    others = [type(child).__name__ for child in tabs.children if not isinstance(child, gr.Tab)]
    assert not others, (
        f"{others} made beside the tabs: Gradio counts them as tabs, and opening a later tab puts its name over "
        "that of the next. Make them inside `with gr.Tab(…)`."
    )
