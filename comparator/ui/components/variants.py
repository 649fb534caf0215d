"""Which variants, and which of them is the reference: a list with a box, a colour and a radio button a row.

The list is drawn by page.js (`qc.picker`) from a plain value: {"rows": [{notation, title, why}], "on": [notation],
"reference": notation or "auto", "max": 8}. What comes back from the browser is judged by `Form`, never trusted.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.backends import methods, presets, resolve
from comparator.types import Problem, Variant
from comparator.ui.page import Page

FIRST = ("bf16", "int8", "nf4")


def build(page: Page) -> None:
    gr.HTML('<h2 class="section">Variants <span class="aside">reference</span></h2>', apply_default_css=False)
    page.fields["picked"] = gr.HTML(
        picked(page.settings.max_columns),
        html_template='<div class="picker"></div>',
        js_on_load="qc.picker(element, props, watch)",
        elem_id="variants",
        apply_default_css=False,
    )


def picked(max_columns: int) -> dict[str, Any]:
    """The list of a first visit: every preset, three of them ticked."""
    rows = [row(resolve(notation)) for notation in presets()]
    first = [name for name in FIRST if any(r["notation"] == name and not r["why"] for r in rows)]
    return {"rows": rows, "on": first[:max_columns], "reference": "auto", "max": max_columns}


def row(variant: Variant, custom: bool = False) -> dict[str, Any]:
    """One line of the list. `why` says why it cannot be had here, or is empty."""
    backend, method = methods()[variant.method]
    return {
        "notation": variant.notation,
        "title": title(variant),
        "precision": method.precision,
        "why": backend.unavailable() or "",
        "custom": custom,
    }


def title(variant: Variant) -> str:
    """4-bit NormalFloat, double quantized …: the method's name and what the options change."""
    backend, method = methods()[variant.method]
    said = [method.title]
    for name, value in backend.given(variant).items():
        said.append({"dq": "double quantized"}.get(name, f"{name} {value}"))
    return ", ".join(said)


def with_added(value: Any, notation: str, max_columns: int) -> dict[str, Any]:
    """The list with one more variant, ticked. Raises `Problem` where the notation is wrong or already there."""
    variant = resolve(notation)
    value = value if isinstance(value, dict) else picked(max_columns)
    rows = [r for r in _listed(value.get("rows")) if isinstance(r, dict)]
    on = [name for name in _listed(value.get("on")) if isinstance(name, str)]
    if variant.notation in on:
        raise Problem(
            f"{variant.notation} is in the list and ticked already.", "Change an option to make another one."
        )
    if not any(r.get("notation") == variant.notation for r in rows):
        rows.append(row(variant, custom=True))
    names = [r.get("notation") for r in rows]
    chosen = [name for name in names if name in on or name == variant.notation]
    return {**value, "rows": rows, "on": chosen, "max": max_columns}


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else []
