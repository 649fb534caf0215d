"""What is wrong with an open page: axe-core's findings, what scrolls sideways, tables that lose their edge."""

from __future__ import annotations


def violations(page, within: str | None = None) -> list[str]:
    """axe-core's serious findings on the page, or on what a selector names."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context=within).response
    assert len(found["passes"]) > (3 if within else 10), "axe-core did not look at the page"
    return [
        f"{v['impact']}: {v['help']} at {node['html'][:160]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


def sideways(page) -> list[str]:
    """What reaches over the right edge of the page, unless it scrolls inside something."""
    wide = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
    if wide <= 0:
        return []
    return [f"{wide} px too wide"] + page.evaluate(
        "() => [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
        ".slice(-5).map((e) => e.outerHTML.slice(0, 120))"
    )


def cut_tables(page) -> list[str]:
    """Tables of the open tab that are wider than their place; on a desk none should be."""
    return page.evaluate(
        "() => [...document.querySelectorAll('#tabs .scroll')].filter((e) => e.offsetParent"
        " && e.scrollWidth > e.clientWidth + 1).map((e) => `${e.getAttribute('aria-label')}: ${e.scrollWidth} px`)"
    )
