"""A recipe → the form: fills the fields in from a link or a saved comparison. Runs nothing."""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.comparison.prompts import reader
from comparator.core.errors import UserError
from comparator.core.request import written_variables
from comparator.core.result import Comparison
from comparator.store.links import Recipe, recipe_of
from comparator.ui.form import AUTO, NO_ADAPTER, ONE_PROMPT, OWN_SET, TASK, Form
from comparator.ui.page import Page
from comparator.ui.panel import adapters as adapter_list
from comparator.ui.panel import variants

SETTINGS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "repeats", "decode",
)  # fmt: skip


def outputs(page: Page) -> list[gr.components.Component]:
    return [*page.fields.values(), page.adapter_names, page.columns_off]


def nothing(page: Page) -> list[Any]:
    return [gr.skip()] * len(outputs(page))


def recipe_of_recording(comparison: Comparison) -> Recipe:
    """The request that repeats a comparison. Raises `UserError` if it has a method that is not known here."""
    from dataclasses import replace

    measured = {
        "text" if cell.fidelity.text else "prompt"
        for cell in comparison.cells
        if cell.fidelity and (cell.fidelity.text or cell.fidelity.prompt)
    }
    fidelity = "text" if "text" in measured else "prompt" if measured else None
    return replace(recipe_of(comparison), fidelity=fidelity)


def values(page: Page, recipe: Recipe) -> list[Any]:
    """The values of `outputs`. Fields that the recipe does not set stay unchanged."""
    new: dict[str, Any] = {name: getattr(recipe.settings, name) for name in SETTINGS}
    if recipe.model is not None:
        new["model"] = recipe.model
    if recipe.prompt:
        new["prompt"] = recipe.prompt
    new["prompt_set"], new["set_text"] = _prompt_set(recipe)
    if recipe.task is not None:
        new["prompt_set"], new["task"] = TASK, ", ".join(recipe.task.names)
        new["limit"] = recipe.task.limit or 0
    if recipe.system is not None:
        new["system"] = recipe.system
    if recipe.chat is not None:
        new["chat"] = "on" if recipe.chat else "off"
    if recipe.template.name is not None:
        new["template"] = recipe.template.name
    if recipe.template.variables:
        new["template_vars"] = "\n".join(written_variables(recipe.template.variables))
    if recipe.fidelity is not None:
        new["fidelity"] = recipe.fidelity
    names = off = gr.skip()
    if recipe.cells:
        new["picked"] = _picked(page, recipe)
        adapters = [a or NO_ADAPTER for a in recipe.adapters]
        names = list(dict.fromkeys([*adapter_list.all_here(), *adapters]))
        new["adapters"] = gr.CheckboxGroup(choices=names, value=adapters)
        new["columns"], new["known_columns"], off = _columns(new["picked"], adapters, recipe)
    return [*(new.get(name, gr.skip()) for name in page.fields), names, off]


def _prompt_set(recipe: Recipe) -> tuple[str, Any]:
    """The fields of the set: a shipped one by its name, another as text. A recipe without one asks for one prompt."""
    if recipe.prompts is None:
        return ONE_PROMPT, gr.skip()
    name = recipe.prompts.name
    if name in reader.shipped() and reader.load(name) == recipe.prompts:
        return name, gr.skip()
    return OWN_SET, reader.dumps(recipe.prompts)


def _picked(page: Page, recipe: Recipe) -> dict[str, Any]:
    """The list of variants: the presets, and below them the others of the recipe."""
    most = page.settings.max_columns
    value = variants.picked(most, recipe.model or page.settings.model)
    listed = {row["notation"] for row in value["rows"]}
    for cell in recipe.cells:
        if cell.variant.notation not in listed:
            listed.add(cell.variant.notation)
            value["rows"].append(variants.row(cell.variant, custom=True))
    selected = set(recipe.variants)
    value["on"] = [row["notation"] for row in value["rows"] if row["notation"] in selected]
    value["reference"] = recipe.reference.variant.notation if recipe.reference else AUTO
    return value


def _columns(picked: dict[str, Any], adapters: list[str], recipe: Recipe):
    """Which of variants × adapters are selected: the same boxes that panel/adapters.py shows."""
    try:
        labels = [c.label for c in Form(picked=picked, adapters=adapters).cells()]
    except UserError:
        labels = []
    on = {c.label for c in recipe.cells}
    useful = any(name != NO_ADAPTER for name in adapters) and len(labels) > 1
    chosen = [label for label in labels if label in on]
    off = [label for label in labels if label not in on]
    return gr.CheckboxGroup(choices=labels, value=chosen, visible=useful), labels, off
