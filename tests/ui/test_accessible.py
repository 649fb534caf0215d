"""Light, dark, a desk and a phone: no serious axe-core violation, nothing that scrolls sideways."""

from __future__ import annotations

import pytest
from page_checks import clipped, cut_tables, settled, sideways, tabs, violations

pytestmark = pytest.mark.browser

SIZES = {"desk": (1440, 900), "phone": (390, 844)}
# Each size once and each colour once; axe takes its time, so the other two are slow tests.
LOOKS = [
    pytest.param("desk", False, id="desk-light"),
    pytest.param("phone", True, id="phone-dark"),
    pytest.param("desk", True, id="desk-dark", marks=pytest.mark.slow),
    pytest.param("phone", False, id="phone-light", marks=pytest.mark.slow),
]
DRAWN = ("Latency", "Memory", "Fidelity")  # tabs with plots of the comparison
NARROW = (640, 320)  # a window of 1280 px at 200 % zoom, and the narrowest that WCAG 1.4.10 asks for


@pytest.mark.parametrize(("size", "dark"), LOOKS)
def test_first_visit(visit, size, dark):
    width, height = SIZES[size]
    visitor = visit(width=width, height=height, dark=dark)
    visitor.page.wait_for_function("() => /parameters/.test(document.querySelector('#facts').innerText)"
                                   if size == "desk" else "() => true")  # fmt: skip
    assert not violations(visitor.page)
    assert not sideways(visitor.page)
    if size == "phone":
        assert not visitor.page.locator("#panel").is_visible(), "on a phone the panel folds away"
        visitor.page.click("#panel-toggle")
        assert visitor.page.locator("#panel").is_visible()
    visitor.page.click('#custom button:has-text("Custom variant")')
    visitor.page.click('button:has-text("More settings")')
    visitor.page.wait_for_selector("#set-top-p input", timeout=10_000)
    assert not violations(visitor.page), "with everything unfolded"
    assert not sideways(visitor.page), "with everything unfolded"
    moving = visitor.page.evaluate(  # the browser asks for reduced motion
        "() => [...document.querySelectorAll('body *')].filter((e) => { const s = getComputedStyle(e);"
        " return s.animationName !== 'none' || s.transitionDuration.split(',').some((t) => parseFloat(t) > 0); })"
        ".map((e) => e.outerHTML.slice(0, 100))"
    )
    assert not moving, moving[:5]


@pytest.mark.parametrize(("size", "dark"), LOOKS)
def test_after_a_run(compared, size, dark):
    """The same finished comparison, in the other size and colours; every tab."""
    page, names = compared.page, tabs(compared.page)
    assert {"Differences", "Layers", "Fidelity", "Adapters", "Train", "History"} <= set(names)
    # One layer's rows are as good as thirty layers', and axe takes its time over every cell.
    compared.tab("Layers")
    search = page.locator("#layers-search textarea, #layers-search input")
    search.fill("layers.0. ")
    page.wait_for_function("() => document.querySelectorAll('[data-table=tensors] tbody tr').length < 20")
    page.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
    page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", dark)
    try:
        for number, name in enumerate(names):
            compared.tab(name)
            page.wait_for_function(  # a tab that is opened for the first time draws its plots then
                "(drawn) => !drawn || ![...document.querySelectorAll('#tabs .picture:has(.empty)')].some((e) => e.offsetParent)",
                arg=name in DRAWN,
            )
            settled(page)
            # What surrounds the tabs stays the same.
            assert not violations(page, within="#tabs" if number else None), f"tab {name}"
            assert not sideways(page), f"tab {name}"
            # On a phone the open tab moves from the menu to the bar, so the order is another.
            assert sorted(tabs(page)) == sorted(names), "a tab got another's name as it was opened"
            assert not clipped(page), f"tab {name}"
            assert size == "phone" or not cut_tables(page), f"tab {name} loses the edge of a table"
            for narrow in NARROW if size == "phone" else ():
                page.set_viewport_size({"width": narrow, "height": 900})
                settled(page)
                assert not (sideways(page) or clipped(page)), f"tab {name} at {narrow} px"
            page.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
    finally:
        page.set_viewport_size({"width": 1440, "height": 900})
        page.evaluate("() => document.body.classList.remove('dark')")
        compared.tab("Layers")
        search.fill("")


def test_dark_is_dark(visit):
    light, dark = visit(), visit(dark=True)
    read = (
        "() => [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.brand h1')).color]"
    )
    colours = [v.page.evaluate(read) for v in (light, dark)]

    def brightness(css: str) -> float:
        return sum(int(part) for part in css[css.index("(") + 1 : -1].split(",")[:3]) / 3

    assert brightness(colours[0][0]) > 200 and brightness(colours[0][1]) < 80
    assert brightness(colours[1][0]) < 60 and brightness(colours[1][1]) > 180


def test_a_keyboard_reaches_everything(visitor):
    """Tab through the page: every stop is visible, and Run and the variants are among them."""
    reached = []
    for _ in range(60):
        visitor.page.keyboard.press("Tab")
        reached.append(
            visitor.page.evaluate(
                "() => { const e = document.activeElement; const box = e.getBoundingClientRect();"
                " return [e.id || e.value || e.innerText.slice(0, 30) || e.tagName, box.width * box.height > 0]; }"
            )
        )
    names = [name for name, _ in reached]
    assert "run" in names and "bf16" in names, f"not reached by keyboard: {names}"
    hidden = [name for name, visible in reached if not visible and name != "BODY"]
    assert not hidden, f"the focus goes to what cannot be seen: {hidden}"
