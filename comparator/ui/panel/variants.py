"""Which variants, and which of them is the reference: a list of check boxes, colours and radio buttons.

The list is drawn by page.js (`qc.picker`) from a plain value: {"rows": [{notation, title, speed, why}], "on": [notation],
"reference": notation or "auto", "max": 8}. `Form` validates what the browser sends.
"""

from __future__ import annotations

import os
from typing import Any

import gradio as gr

from comparator.backends import methods, offers, own_variant, presets, resolve
from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.core.state import ModelFacts
from comparator.core.variant import Variant
from comparator.metrics import nvml
from comparator.ui.page import Page, html
from comparator.util import formatting

FIRST = ("bf16", "int8", "nf4")
# The usual questions: the button's words, what it selects, and the words on hover.
QUESTIONS = (
    ("8 or 4 bit?", FIRST, "bf16 with the most used 8-bit and 4-bit method"),
    ("Which 8 bit?", ("bf16", "int8", "torchao", "torchao:scheme=fp8"), "Methods with 8 bits per weight"),
    ("Which 4 bit?", ("bf16", "nf4", "hqq", "gptq", "awq"), "Methods with 4 bits per weight; gptq and awq are quantized at their first use, "
     "which takes minutes"),
)  # fmt: skip
# Headings in the list: by bits of a quantized value, then what other machines compute.
GROUPS = ("16 bit and more", "8 bit", "4 bit and fewer", "servers")


def build(page: Page) -> None:
    html('<h2 class="section">Variants <span class="aside">reference</span></h2>')
    page.fields["picked"] = html(
        picked(page.settings.max_columns, page.settings.model),
        html_template='<div class="picker"></div>',
        js_on_load="qc.picker(element, props, watch)",
        elem_id="variants",
    )
    # Apart from the list: looking sizes up takes time, and what the visitor selects meanwhile must stay selected.
    page.sizes = gr.JSON({}, visible=False, elem_id="variant-sizes")


def picked(max_columns: int, model: str = "") -> dict[str, Any]:
    """The list on a first visit: every preset and what this model has beside them, three of them selected."""
    offered = offers(model)
    rows = sorted(map(row, map(resolve, (*presets(), *offered))), key=lambda r: GROUPS.index(r["group"]))
    first = [name for name in FIRST if any(r["notation"] == name and not r["why"] for r in rows)]
    return {
        "rows": rows,
        "on": first[:max_columns],
        "questions": _questions(rows, max_columns),
        "reference": "auto",
        "max": max_columns,
        "offered": offered,
    }


def _questions(rows: list[dict[str, Any]], max_columns: int) -> list[dict[str, Any]]:
    """The buttons above the list: those whose question at least two variants answer here."""
    here = {r["notation"] for r in rows if not r["why"]}
    questions = [(words, [n for n in names if n in here], more) for words, names, more in QUESTIONS]
    return [
        {"words": words, "on": names[:max_columns], "title": more}
        for words, names, more in questions
        if len(names) > 1
    ]


def for_model(value: Any, facts: ModelFacts | None, max_columns: int) -> dict[str, Any] | None:
    """The list for another model, or None where it stays as it is: with what that model has beside the presets; of a
    quantized model its own variant is selected, and what needs full precision is unavailable."""
    listed = value if isinstance(value, dict) else {}
    before, own = listed.get("quantized"), own_variant(facts) if facts else None
    if own is None or facts is None:
        return _with_offers(listed, facts, max_columns)
    if before == own.notation:
        return None
    new = picked(max_columns)
    rows = [{**r, "why": f"{facts.source} is quantized already"} for r in new["rows"]]
    return {
        **new,
        "rows": [{**row(own), "group": "this model"}, *rows],
        "questions": [],
        "on": [own.notation],
        "quantized": own.notation,
    }


def written_sizes(sizes: dict[str, int]) -> dict[str, str]:
    """How much each variant holds once loaded, in MB, for the list. sizes: bytes by notation."""
    return {name: formatting.megabytes(size) for name, size in sizes.items()}


def _with_offers(listed: dict, facts: ModelFacts | None, max_columns: int) -> dict[str, Any] | None:
    """As `for_model`, of a model in full precision, or one of which nothing is known."""
    new = picked(max_columns, facts.source if facts else "")
    if listed.get("quantized"):
        return new
    if facts is None or new["offered"] == listed.get("offered", []):
        return None
    withdrawn = set(_listed(listed.get("offered"))) - set(new["offered"])
    added = [r for r in _listed(listed.get("rows")) if isinstance(r, dict) and r.get("custom")]
    on = [name for name in _listed(listed.get("on")) if name not in withdrawn]
    return {**listed, "rows": [*new["rows"], *added], "on": on, "offered": new["offered"], "max": max_columns}


def row(variant: Variant, custom: bool = False) -> dict[str, Any]:
    """One row of the list. `why` says why the variant is unavailable here, or is empty."""
    backend, method = methods()[variant.method]
    bits = backend.bits(variant)
    group = GROUPS[-1] if backend.source_kind == "endpoint" else GROUPS[(bits < 16) + (bits <= 4)]
    return {
        "notation": variant.notation,
        "title": backend.describe(variant),
        "precision": method.precision,
        "speed": backend.decode_speed(variant, _on_gpu()),
        "why": backend.unavailable(variant) or _no_gpu(backend.needs_cuda(variant)),
        "custom": custom,
        "group": "added" if custom else group,
    }


def _on_gpu() -> bool:
    """Whether variants run on an NVIDIA GPU: here, or on ZeroGPU or over Ray, where it is elsewhere."""
    return bool(os.environ.get("SPACES_ZERO_GPU") or get_settings().ray_address or nvml.gpus())


def _no_gpu(needs_cuda: bool) -> str:
    """Why a variant for CUDA is unavailable here; "" where it is not."""
    if not needs_cuda or _on_gpu():
        return ""
    return "runs on an NVIDIA GPU only, and there is none here"


def with_added(value: Any, notation: str, max_columns: int) -> dict[str, Any]:
    """The list with one more variant, selected. Raises `UserError` if the notation is invalid or already selected."""
    variant = resolve(notation)
    value = value if isinstance(value, dict) else picked(max_columns)
    rows = [r for r in _listed(value.get("rows")) if isinstance(r, dict)]
    on = [name for name in _listed(value.get("on")) if isinstance(name, str)]
    if variant.notation in on:
        raise UserError(
            f"{variant.notation} is already in the list and selected.",
            "Change an option to add another variant.",
        )
    if not any(r.get("notation") == variant.notation for r in rows):
        rows.append(row(variant, custom=True))
    names = [r.get("notation") for r in rows]
    chosen = [name for name in names if name in on or name == variant.notation]
    return {**value, "rows": rows, "on": chosen, "max": max_columns}


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else []
