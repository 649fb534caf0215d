"""The model field: names on the Hub as one types, what is known of a model, and a run of one from there."""

from __future__ import annotations

import contextlib

import pytest
from playwright.sync_api import TimeoutError

pytestmark = pytest.mark.browser


def test_names_on_the_hub_come_as_one_types(visitor, hub):
    hub.add("someone/lighthouse-7b", {"config.json": b"{}"})
    hub.add("another/lighthouse-mini", {"config.json": b"{}"})
    hub.add("someone/else", {"config.json": b"{}"})
    page = visitor.page
    box = page.locator("#model input")
    box.click()
    suggested = page.get_by_role("option", name="another/lighthouse-mini")
    for _ in range(15):  # a search has two seconds; where two busy cores need more, people type again
        box.fill("")
        box.press_sequentially("lighthouse", delay=60)
        with contextlib.suppress(TimeoutError):
            suggested.wait_for(timeout=4_000)
            break
    searches = [path for _, path in hub.requests if path == "api/models"]
    assert suggested.is_visible(), (
        f"No suggestion after typing again and again; the Hub was asked {len(searches)} times. None: key_up no "
        "longer searches. Some: what it found does not reach the list."
    )
    assert box.input_value() == "lighthouse", "what is being typed is left alone"
    assert page.get_by_role("option", name="someone/else").count() == 0
    page.get_by_role("option", name="someone/lighthouse-7b").click()
    page.wait_for_function(
        "() => document.querySelector('#model input').value === 'someone/lighthouse-7b'", timeout=30_000
    )
    page.wait_for_function("() => document.querySelector('#facts').innerText.length > 10", timeout=30_000)
