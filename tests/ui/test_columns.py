"""From five columns on: a strip with a pinned column, collapsed ones and an order of the visitor's own, opened from a link."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample
from page_checks import sideways, violations

pytestmark = pytest.mark.browser

FIRST = [cell.label for cell in sample.many().cells]


def order(page) -> list[str]:
    """Labels from left to right, as they are seen."""
    return page.evaluate(
        "() => [...document.querySelectorAll('#cards > .slot:has(.card)')]"
        ".sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left)"
        ".map((s) => s.querySelector('.card').getAttribute('aria-label'))"
    )


def slot(page, label: str):
    return page.locator(f'#cards > .slot:has(.card[aria-label="{label}"])')


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1440, False, id="desk-light"),
        pytest.param(320, True, id="phone-dark", marks=pytest.mark.slow),
    ],
)
def test_many_columns_are_arranged_and_stay_so(visit, saved, width, dark):
    whole = sample.many()
    other = replace(whole, cells=tuple(replace(c, text=f"{c.text} Again.") for c in whole.cells))
    first, second = saved.save(whole), saved.save(other)
    visitor = visit(f"?c={first}", width=width, dark=dark)
    page = visitor.page
    page.wait_for_selector("#cards[data-strip]")
    assert order(page) == FIRST
    page.click('[aria-label="Pin bf16"]')
    page.click('[aria-label="Collapse nf4"]')
    slot(page, "fp16").focus()
    page.keyboard.press("Alt+ArrowRight")
    arranged = ["bf16", "int8", "fp16", *FIRST[3:]]
    assert order(page) == arranged, "Alt + → did not move the column that has the focus"
    assert "fp16" in page.evaluate("() => document.activeElement.ariaLabel"), (
        "the moved column lost the focus"
    )
    page.keyboard.press("End")
    pinned, last, strip = (
        page.locator(s).bounding_box() for s in (".slot[data-pinned]", ".slot:focus", "#cards")
    )
    assert page.evaluate("() => document.activeElement.ariaLabel") == f"{FIRST[-1]}, column 8 of 8"
    assert abs(pinned["x"] - strip["x"]) < 6, "the pinned column scrolled away"
    assert pinned["x"] + pinned["width"] <= last["x"] + 1, "the focused column lies under the pinned one"
    assert last["x"] + last["width"] <= strip["x"] + strip["width"] + 1
    assert slot(page, "nf4").bounding_box()["width"] < 48, "a collapsed column is as wide as its name"
    assert not violations(page, "#cards") and not sideways(page)
    # Another document of the same columns: the server draws every card anew, as it does while answers stream.
    visitor.tab("History")
    page.locator(f'li[data-id="{second}"] a.open').click()
    page.wait_for_function("() => /Again/.test(document.querySelector('.card .answer').innerText)")
    assert page.locator(".slot[data-pinned] .card").get_attribute("aria-label") == "bf16"
    slot(page, "bf16").focus()
    page.keyboard.press("Home")
    assert order(page) == arranged, "drawing the cards anew undid their order"
    assert not visitor.complaints, visitor.complaints
    page.reload()
    page.wait_for_selector("#cards[data-pinned]")
    assert order(page) == arranged and slot(page, "nf4").get_attribute("data-collapsed") is not None
    page.click("[data-reset]")
    assert order(page) == FIRST and not page.locator(".slot:is([data-pinned], [data-collapsed])").count()


def test_a_column_is_dragged_and_four_are_no_strip(visit, saved):
    page = visit(f"?c={saved.save(sample.many())}").page
    page.wait_for_selector("#cards[data-strip]")
    drag = page.locator('[aria-label="Move bf16"]')
    for _ in range(20):  # what is drawn above the cards may still move them between two of these steps
        drag.hover()
        page.mouse.down()
        if page.locator("#cards[data-dragging]").count():
            break
        page.mouse.up()
    handle, target = drag.bounding_box(), slot(page, "int8").bounding_box()
    page.mouse.move(target["x"] + target["width"] * 0.6, handle["y"] + 5, steps=12)
    page.mouse.up()
    assert order(page)[:3] == ["fp16", "int8", "bf16"]
    page = visit(f"?c={saved.save(sample.comparison())}").page
    page.wait_for_selector(".card >> nth=3")
    assert not page.locator("#cards[data-strip], .column-tools:visible, .columns-bar:visible").count()
