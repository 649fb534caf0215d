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

    assert not page.locator("#capacity-select").is_visible(), (
        "another card's variants are offered for this machine"
    )

    page.locator("#capacity-context input, #capacity-context textarea").fill("many")
    page.click("#capacity-run")
    page.wait_for_selector("#capacity-result .bad")
    assert "is not a number of tokens" in visitor.text("#capacity-result")


def test_what_fits_here_is_selected_with_one_click(visitor):
    visitor.tab("Capacity")
    page = visitor.page
    page.click("#capacity-run")
    page.wait_for_selector("#capacity-select", timeout=120_000)
    page.click("#capacity-select")
    page.wait_for_function(
        "() => document.querySelectorAll('.pick input[type=checkbox]:checked').length === 8"
    )
    checked = page.evaluate(
        "() => [...document.querySelectorAll('.pick')].filter((p) => p.querySelector('input[type=checkbox]').checked).map((p) => p.dataset.notation)"
    )
    assert "fp32" in checked and "bf16" in checked
    assert not visitor.complaints


def test_what_fits_is_named_as_the_panel_lists_it():
    """The plan's own row has the sizes that the model decided (gptq:g64), which no row of the panel is called."""
    from comparator.backends import methods
    from comparator.capacity import cards
    from comparator.core.settings import get_settings
    from comparator.deploy.limits import limits_of
    from comparator.ui.tabs import capacity

    shown, names = capacity._shown(limits_of(get_settings()), "smollm2-135m", (), cards.HERE, "512", "1")
    listed = {n for _, method in methods().values() for n in method.ready_notations}
    assert "gptq" in names and "nf4" in names, shown
    assert set(names) <= listed | {"gguf:q4_k_m"}, set(names) - listed
