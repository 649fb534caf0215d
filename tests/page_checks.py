"""What is wrong with an open page: axe-core's findings, what scrolls sideways, tables that lose their edge, labels over labels."""

from __future__ import annotations


def violations(page, within: str | None = None) -> list[str]:
    """axe-core's serious findings on the page, or on what a selector names."""
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe("0") if page.evaluate("() => 'axe' in window") else Axe()  # half a megabyte, once for each page
    found = axe.run(page, context=within).response
    assert len(found["passes"]) > (3 if within else 10), "axe-core did not look at the page"
    return [
        f"{v['impact']}: {v['help']} at {node['html'][:160]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


def tabs(page) -> list[str]:
    """Names of all tabs; where the window is narrow some stand in a menu."""
    names = page.locator('#tabs button[role="tab"], #tabs .overflow-dropdown button').all_text_contents()
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def settled(page) -> None:
    """Wait until every visible plot is drawn and has fitted itself to its place."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('#tabs .js-plotly-plot')].every((e) =>"
        " !e.offsetParent || Math.abs((e._fullLayout?.width ?? 0) - e.clientWidth) <= 1)"
    )


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


def overlapping(page, labels: str) -> list[str]:
    """Pairs of the visible elements that a selector names whose boxes share more than a pixel, and those cut off by the window."""
    return page.evaluate(
        """(labels) => {
          const boxes = [...document.querySelectorAll(labels)].filter((e) => e.getClientRects().length)
            .map((e) => [e.textContent, e.getBoundingClientRect()]);
          const found = boxes.filter(([, b]) => b.left < 0 || b.right > innerWidth).map(([text]) => `${text} is cut off`);
          boxes.forEach(([text, a], n) => boxes.slice(n + 1).forEach(([other, b]) => {
            const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (wide > 1 && high > 1) found.push(`${text} and ${other}`);
          }));
          return boxes.length ? found : ["there are no labels"];
        }""",
        labels,
    )


def clipped(page) -> list[str]:
    """Visible text beside the panel that is cut off, unless an ellipsis with a title is meant."""
    return page.evaluate(
        """() => {
          const found = new Set(), seen = (e) => e.offsetParent && e.getClientRects().length;
          for (const e of document.querySelectorAll('#main :is(p, h3, td, th, dd, dt, button, summary, code, span)')) {
            const style = getComputedStyle(e);
            if (!seen(e) || style.display === 'inline' || style.overflowX === 'visible') continue;
            if (e.closest('[role=tablist]')) continue; // Gradio moves tabs into a menu a moment after the window narrows
            if (e.clientWidth <= 1 || e.scrollWidth <= e.clientWidth + 1) continue;
            const meant = style.textOverflow === 'ellipsis' && (e.title || e.closest('[title]'));
            if (!meant) found.add(`cut: ${e.tagName.toLowerCase()}.${e.className} “${e.innerText.slice(0, 60)}”`);
          }
          return [...found];
        }"""
    )
