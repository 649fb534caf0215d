"""The Train tab, before a run: base, data and settings, and what comes of them as one types.

Lays the fields out from `training.settings.SETTINGS`, shows the data as the model will see it and what a run would take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from comparator import plots_training
from comparator.backends import methods, presets, resolve
from comparator.training import jobs
from comparator.training.settings import ALL_LINEAR, SETTINGS, Setting
from comparator.training.types import FORMS, DataPreview
from comparator.types import Problem
from comparator.ui import train_form
from comparator.ui.components import train_data
from comparator.ui.components.notice import problem, say
from comparator.ui.components.variants import title
from comparator.ui.markup import note
from comparator.ui.page import PRIVATE, Choice, Page, picture
from comparator.ui.train_form import TrainForm, Uploaded

BASE = "nf4:dq"
FILES = [".jsonl", ".json", ".csv", ".parquet"]
RESHAPING = ("max_length", "completion_only", "held_back", "seed")  # change what the samples look like
SWITCHES = [("as it fits", train_form.AUTO), ("on", "on"), ("off", "off")]
INTRO = (
    "Keep a base frozen, 4-bit or not, and train a small LoRA adapter on top of it (QLoRA). It then stands in the list of "
    "adapters, to be compared on every variant."
)
FORM_HELP = (
    "Recognized by the names of the columns. Where they do not tell, choose the form and name the columns."
)
ROLES = {
    "messages": "Column of messages",
    "prompt": "Column of prompts",
    "completion": "Column of completions",
    "text": "Column of text",
}


@dataclass
class Asking:
    """The fields in the order in which `form` takes their values."""

    base: gr.components.Component
    data: gr.Textbox
    uploaded: gr.State
    form: gr.components.Component
    name: gr.Textbox
    columns: dict[str, gr.components.Component] = field(default_factory=dict)
    settings: dict[str, gr.components.Component] = field(default_factory=dict)

    def inputs(self, page: Page) -> list[gr.components.Component]:
        around = [page.fields[name] for name in ("model", "prompt", "system")]
        own = [self.base, self.data, self.uploaded, self.form, self.name]
        return [*around, *own, *self.columns.values(), *self.settings.values()]

    def read(self, values: tuple[Any, ...]) -> TrainForm:
        """The values of `inputs` as a form."""
        model, prompt, system, base, data, uploaded, form, name, *rest = values
        columns = dict(zip(self.columns, rest, strict=False))
        settings = dict(zip(self.settings, rest[len(columns) :], strict=True))
        return TrainForm(model, base, data, uploaded, form, columns, settings, name, prompt, system)


def build(page: Page, tab: gr.Tab) -> Asking:
    gr.HTML(note(INTRO), apply_default_css=False)
    with gr.Row(elem_classes="train-first"):
        base = Choice(
            bases(), value=BASE, label="Base", info="frozen; the adapter is trained on top of it",
            allow_custom_value=True, elem_id="train-base",
        )  # fmt: skip
        data = gr.Textbox(
            jobs.get_trainings().builtin_data()[0], label="Data", max_lines=1, lines=1, elem_id="train-data",
            info="a built-in set, a file (.jsonl, .json, .csv, .parquet) or a Hub data set: user/name@revision:split",
        )  # fmt: skip
    with gr.Row(elem_classes="train-chips"):
        chips = [
            gr.Button(f"{name}, built in", size="sm", elem_classes="chip", elem_id=f"train-{name}")
            for name in jobs.get_trainings().builtin_data()
        ]
        upload = gr.UploadButton(
            f"Upload a file (up to {page.settings.max_upload})", file_types=FILES, file_count="single",
            size="sm", elem_classes="chip", elem_id="train-upload",
        )  # fmt: skip
    uploaded = gr.State(None)
    with gr.Accordion("Form and columns", open=False, elem_classes="fold", elem_id="train-columns") as naming:
        form = gr.Radio(
            [("recognized", train_form.AUTO), *((words.partition(":")[0], name) for name, words in FORMS.items())],
            value=train_form.AUTO, label="Form", info=FORM_HELP, elem_id="train-form",
        )  # fmt: skip
        with gr.Row(elem_classes="train-grid"):
            columns = {
                role: gr.Textbox(
                    "", label=words, placeholder="recognized", max_lines=1, lines=1, elem_id=f"train-column-{role}"
                )
                for role, words in ROLES.items()
            }  # fmt: skip
    said = gr.HTML(say(""), elem_id="train-read", apply_default_css=False)
    shown = gr.HTML("", elem_id="train-preview", apply_default_css=False)
    with gr.Row(elem_classes="plots", visible=False) as lengths:
        statistics = gr.HTML("", elem_id="train-statistics", apply_default_css=False)
        histogram = picture("How long the samples are")
    behind = gr.HTML("", apply_default_css=False)
    gr.HTML("<h3>Settings</h3>", apply_default_css=False)
    settings, name = _settings()
    plan = gr.HTML("", elem_id="train-plan", apply_default_css=False)
    asking = Asking(base, data, uploaded, form, name, columns, settings)

    known = gr.State(None)  # the preview that the estimate is made from
    seen = gr.State(False)  # whether the tab was ever opened: a tokenizer is loaded for nobody else
    targets = settings["target_modules"]
    outputs = [said, shown, lengths, statistics, histogram, behind, plan, targets, known, seen, naming]

    def read(opened: bool, *values: Any) -> Iterator[list[Any]]:
        if opened:
            yield from look(asking.read(values))

    def first(opened: bool, *values: Any) -> Iterator[list[Any]]:
        if not opened:
            yield from look(asking.read(values))

    def weigh(opened: bool, found: DataPreview | None, *values: Any) -> str:
        return planned(asking.read(values), found) if opened else gr.skip()

    def took(path: str | None):
        if not path:
            return gr.skip(), gr.skip()
        name = Path(path).name
        return name, Uploaded(path, name)

    everything = asking.inputs(page)
    tab.select(first, inputs=[seen, *everything], outputs=outputs, trigger_mode="once", **PRIVATE)
    for chip, name in zip(chips, jobs.get_trainings().builtin_data(), strict=True):
        chip.click(lambda name=name: name, outputs=[data], **PRIVATE).then(
            read, inputs=[seen, *everything], outputs=outputs, **PRIVATE
        )
    upload.upload(took, inputs=[upload], outputs=[data, uploaded], **PRIVATE).then(
        read, inputs=[seen, *everything], outputs=outputs, **PRIVATE
    )
    gr.on(
        [
            data.submit, data.blur, form.change, page.fields["model"].change,
            *(e for c in columns.values() for e in (c.submit, c.blur)),
            *(settings[name].change for name in RESHAPING),
        ],
        read, inputs=[seen, *everything], outputs=outputs, trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    gr.on(
        [base.change, *(c.change for name, c in settings.items() if name not in RESHAPING)],
        weigh, inputs=[seen, known, *everything], outputs=[plan], trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    return asking


def bases() -> list[tuple[str, str]]:
    """The ready-made variants that can be had here; the lightest first, since that is what QLoRA is for."""
    listed = [BASE, *(p for p in presets() if p != BASE)]
    return [
        (f"{name} · {title(variant)}", name)
        for name in listed
        if not methods()[(variant := resolve(name)).method][0].unavailable()
    ]


def _settings() -> tuple[dict[str, gr.components.Component], gr.Textbox]:
    by_name = {s.name: s for s in SETTINGS}
    made: dict[str, gr.components.Component] = {}
    with gr.Row(elem_classes="train-grid"):
        for name in train_form.FIRST:
            made[name] = _field(by_name[name])
        called = gr.Textbox(
            "", label="Name", info="what the adapter is called in the list", placeholder="made from data and base",
            max_lines=1, lines=1, elem_id="train-name",
        )  # fmt: skip
    with gr.Accordion("More settings", open=False, elem_classes="fold", elem_id="train-more"):
        rest = [s for s in SETTINGS if s.name not in train_form.FIRST]
        for group in dict.fromkeys(s.group for s in rest):
            gr.HTML(f'<h4 class="train-group">{group}</h4>', apply_default_css=False)
            with gr.Row(elem_classes="train-grid"):
                for setting in (s for s in rest if s.group == group):
                    made[setting.name] = _field(setting)
    return made, called


def _field(setting: Setting) -> gr.components.Component:
    common = {
        "label": setting.title,
        "info": setting.help,
        "elem_id": f"train-set-{setting.name.replace('_', '-')}",
    }
    if setting.kind == "bool":
        return gr.Checkbox(setting.default, **common)
    if setting.kind == "bool-or-auto":
        return Choice(SWITCHES, value=train_form.AUTO, filterable=False, **common)
    if setting.kind == "choice":
        return Choice(list(setting.choices), value=setting.default, filterable=False, **common)
    if setting.kind == "names":
        return gr.Dropdown(
            [("all linear layers", ALL_LINEAR)], value=list(setting.default), multiselect=True,
            allow_custom_value=True, **common,
        )  # fmt: skip
    # No minimum or maximum: Gradio would refuse with a bare sentence; `TrainForm` says which field and which range.
    return gr.Number(setting.default, step=1 if setting.kind == "int" else None, min_width=80, **common)


# ---------------------------------------------------------------- what comes of the fields


def look(form: TrainForm) -> Iterator[list[Any]]:
    """Values of (line, preview, the pictures' row, statistics, histogram, its table, plan, targets, preview, seen, the fold of
    columns)."""
    yield [say("Reading the data …"), *(gr.skip() for _ in range(10))]
    try:
        source, model, settings = form.source(), form.chosen_model(), form.train_settings()
        system = str(form.system or "").strip() or None
        found = jobs.get_trainings().preview(source, model, settings, system)
    except Problem as wrong:
        yield [
            problem(wrong),
            "",
            gr.Row(visible=False),
            "",
            gr.skip(),
            "",
            "",
            gr.skip(),
            None,
            True,
            _unfold(wrong),
        ]
        return
    yield [
        say(""),
        train_data.preview(found, settings.max_length),
        gr.Row(visible=True),
        train_data.statistics(found, settings.max_length),
        plots_training.token_lengths(found.tokens, settings.max_length),
        train_data.histogram_table(found),
        planned(form, found),
        _targets(model),
        found,
        True,
        gr.skip(),
    ]


def _unfold(wrong: Problem):
    """Where the columns are what stands in the way, the fields that name them."""
    return gr.Accordion(open=True) if "column" in f"{wrong}" else gr.skip()


def _targets(model: str):
    """The model's own layers to choose from."""
    try:
        found = jobs.get_trainings().targets(model)
    except Problem:
        return gr.skip()
    named = [(f"{t.name} ({t.count} × {t.inputs:,} → {t.outputs:,})", t.name) for t in found]
    return gr.Dropdown(choices=[("all linear layers", ALL_LINEAR), *named])


def planned(form: TrainForm, found: DataPreview | None) -> str:
    """What a run would take, or what stands in its way; nothing while the data cannot be read."""
    if found is None:
        return ""
    try:
        request = form.request()
        return train_data.estimate(jobs.get_trainings().estimate(request, found), request.base)
    except Problem as wrong:
        return problem(wrong)
