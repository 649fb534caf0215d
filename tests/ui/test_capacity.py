"""The Capacity tab in a browser: a plan of the selected model, and what is wrong with a form."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser


def test_a_plan_of_the_selected_model(visitor):
    visitor.tab("Capacity")
    page = visitor.page
    card = page.get_by_label("Card, or 24GB@1008GB/s")
    card.fill("24GB@1008GB/s")
    card.press("Enter")
    page.click("#capacity-run")
    page.wait_for_selector("#capacity-result table", timeout=120_000)
    said = visitor.text("#capacity-result")
    assert "Estimate, not a measurement" in said, "a figure that was not measured must say so"
    assert "1,008 GB/s (typed)" in said
    rows = page.locator("#capacity-result tbody tr").all_inner_texts()
    weights = {row.split()[0]: float(row.split()[1]) for row in rows if row.split()[2] == "MB"}
    assert weights["bf16"] > weights["int8"] > weights["nf4"]

    page.locator("#capacity-context input, #capacity-context textarea").fill("many")
    page.click("#capacity-run")
    page.wait_for_selector("#capacity-result .bad")
    assert "is no number of tokens" in visitor.text("#capacity-result")
