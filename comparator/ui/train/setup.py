"""The Train tab, before a run: base, data and settings, with a preview of the data and an estimate.

The fields of the settings come from `training.settings.SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from comparator.backends import backend_for, presets, resolve
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.engines import get_trainings
from comparator.reporting.plots import training
from comparator.training.settings import ALL_LINEAR, SETTINGS, Setting
from comparator.training.types import FORMS, DataPreview
from comparator.ui.markup import note
from comparator.ui.page import PRIVATE, Choice, Page, html, picture
from comparator.ui.results.notice import problem, say
from comparator.ui.train import form as train_form
from comparator.ui.train import preview as train_preview
from comparator.ui.train.form import TrainForm, Uploaded

BASE = "nf4:dq"
FILES = [".jsonl", ".json", ".csv", ".parquet"]
RESHAPING = ("max_length", "completion_only", "held_back", "seed")  # these change the preview of the samples
SWITCHES = [("automatic", train_form.AUTO), ("on", "on"), ("off", "off")]
INTRO = (
    "Train a small LoRA adapter on a frozen base, 4-bit or not (QLoRA). It is then listed under Adapters and can be compared "
    "on every variant."
)
FORM_HELP = "Detected from the names of the columns. If that fails, select the format and name the columns."
ROLES = {
    "messages": "Column of messages",
    "prompt": "Column of prompts",
    "completion": "Column of completions",
    "text": "Column of text",
}


@dataclass
class SetupFields:
    """The fields, in the order in which `read` takes their values."""

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
        """The values of `inputs` → a form."""
        model, prompt, system, base, data, uploaded, form, name, *rest = values
        columns = dict(zip(self.columns, rest, strict=False))
        settings = dict(zip(self.settings, rest[len(columns) :], strict=True))
        return TrainForm(model, base, data, uploaded, form, columns, settings, name, prompt, system)


def build(page: Page, tab: gr.Tab) -> SetupFields:
    html(note(INTRO))
    with gr.Row(elem_classes="train-first"):
        base = Choice(
            bases(), value=BASE, label="Base", info="frozen; the adapter is trained on top of it",
            allow_custom_value=True, elem_id="train-base",
        )  # fmt: skip
        data = gr.Textbox(
            get_trainings().builtin_data()[0], label="Data", max_lines=1, lines=1, elem_id="train-data",
            info="a built-in set, a file (.jsonl, .json, .csv, .parquet) or a Hub data set: user/name@revision:split",
        )  # fmt: skip
    with gr.Row(elem_classes="train-chips"):
        chips = [
            gr.Button(f"{name}, built in", size="sm", elem_classes="chip", elem_id=f"train-{name}")
            for name in get_trainings().builtin_data()
        ]
        upload = gr.UploadButton(
            f"Upload a file (up to {page.settings.max_upload})", file_types=FILES, file_count="single",
            size="sm", elem_classes="chip", elem_id="train-upload",
        )  # fmt: skip
    uploaded = gr.State(None)
    with gr.Accordion(
        "Format and columns", open=False, elem_classes="fold", elem_id="train-columns"
    ) as naming:
        form = gr.Radio(
            [("detected", train_form.AUTO), *((words.partition(":")[0], name) for name, words in FORMS.items())],
            value=train_form.AUTO, label="Format", info=FORM_HELP, elem_id="train-form",
        )  # fmt: skip
        with gr.Row(elem_classes="train-grid"):
            columns = {
                role: gr.Textbox(
                    "", label=words, placeholder="detected", max_lines=1, lines=1, elem_id=f"train-column-{role}"
                )
                for role, words in ROLES.items()
            }  # fmt: skip
    status = html(say(""), elem_id="train-read")
    shown = html(elem_id="train-preview")
    with gr.Row(elem_classes="plots", visible=False) as lengths:
        statistics = html(elem_id="train-statistics")
        histogram = picture("Length of the samples")
    behind = html()
    html("<h3>Settings</h3>")
    settings, name = _settings()
    plan = html(elem_id="train-plan")
    fields = SetupFields(base, data, uploaded, form, name, columns, settings)

    last_preview = gr.State(None)  # the preview that the estimate is based on
    opened_once = gr.State(False)  # whether the tab was opened: before that no tokenizer is loaded
    targets = settings["target_modules"]
    outputs = [
        status,
        shown,
        lengths,
        statistics,
        histogram,
        behind,
        plan,
        targets,
        last_preview,
        opened_once,
        naming,
    ]

    def read(was_opened: bool, *values: Any) -> Iterator[list[Any]]:
        if was_opened:
            yield from look(fields.read(values))

    def first(was_opened: bool, *values: Any) -> Iterator[list[Any]]:
        if not was_opened:
            yield from look(fields.read(values))

    def weigh(was_opened: bool, preview: DataPreview | None, *values: Any) -> str:
        return planned(fields.read(values), preview) if was_opened else gr.skip()

    def took(path: str | None):
        if not path:
            return gr.skip(), gr.skip()
        name = Path(path).name
        return name, Uploaded(path, name)

    everything = fields.inputs(page)
    tab.select(first, inputs=[opened_once, *everything], outputs=outputs, trigger_mode="once", **PRIVATE)
    for chip, name in zip(chips, get_trainings().builtin_data(), strict=True):
        chip.click(lambda name=name: name, outputs=[data], **PRIVATE).then(
            read, inputs=[opened_once, *everything], outputs=outputs, **PRIVATE
        )
    upload.upload(took, inputs=[upload], outputs=[data, uploaded], **PRIVATE).then(
        read, inputs=[opened_once, *everything], outputs=outputs, **PRIVATE
    )
    gr.on(
        [
            data.submit, data.blur, form.change, page.fields["model"].change,
            *(e for c in columns.values() for e in (c.submit, c.blur)),
            *(settings[name].change for name in RESHAPING),
        ],
        read, inputs=[opened_once, *everything], outputs=outputs, trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    gr.on(
        [base.change, *(c.change for name, c in settings.items() if name not in RESHAPING)],
        weigh, inputs=[opened_once, last_preview, *everything], outputs=[plan], trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    return fields


def bases() -> list[tuple[str, str]]:
    """The presets available here; the smallest first, since QLoRA is for that."""
    listed = [BASE, *(p for p in presets() if p != BASE)]
    return [
        (f"{variant.notation} · {backend_for(variant).describe(variant)}", variant.notation)
        for variant in map(resolve, listed)
        if _trains(variant)
    ]


def _trains(variant: Variant) -> bool:
    backend = backend_for(variant)
    try:
        backend.training(variant, "cpu")
    except UserError:
        return False
    return not backend.unavailable(variant)


def _settings() -> tuple[dict[str, gr.components.Component], gr.Textbox]:
    by_name = {s.name: s for s in SETTINGS}
    fields: dict[str, gr.components.Component] = {}
    with gr.Row(elem_classes="train-grid"):
        for name in train_form.FIRST:
            fields[name] = _field(by_name[name])
        called = gr.Textbox(
            "", label="Name", info="of the adapter in the list", placeholder="from data and base",
            max_lines=1, lines=1, elem_id="train-name",
        )  # fmt: skip
    with gr.Accordion("More settings", open=False, elem_classes="fold", elem_id="train-more"):
        rest = [s for s in SETTINGS if s.name not in train_form.FIRST]
        for group in dict.fromkeys(s.group for s in rest):
            html(f'<h4 class="train-group">{group}</h4>')
            with gr.Row(elem_classes="train-grid"):
                for setting in (s for s in rest if s.group == group):
                    fields[setting.name] = _field(setting)
    return fields, called


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
    # No minimum or maximum: Gradio's error would not name the field; `TrainForm` names it and its range.
    return gr.Number(setting.default, step=1 if setting.kind == "int" else None, min_width=80, **common)


# ---------------------------------------------------------------- preview and estimate


def look(form: TrainForm) -> Iterator[list[Any]]:
    """Yields values of (status, preview, row of the plots, statistics, histogram, its table, plan, targets, preview, opened,
    fold of the columns)."""
    yield [say("Reading the data …"), *(gr.skip() for _ in range(10))]
    try:
        source, model, settings = form.source(), form.chosen_model(), form.train_settings()
        system = str(form.system or "").strip() or None
        preview = get_trainings().seen_by(None).preview(source, model, settings, system)
    except UserError as error:
        yield [
            problem(error),
            "",
            gr.Row(visible=False),
            "",
            gr.skip(),
            "",
            "",
            gr.skip(),
            None,
            True,
            _unfold(error),
        ]
        return
    yield [
        say(""),
        train_preview.preview(preview, settings.max_length),
        gr.Row(visible=True),
        train_preview.statistics(preview, settings.max_length),
        training.token_lengths(preview.tokens, settings.max_length),
        train_preview.histogram_table(preview),
        planned(form, preview),
        _targets(model),
        preview,
        True,
        gr.skip(),
    ]


def _unfold(error: UserError):
    """Open the fold of the columns if the error is about columns."""
    return gr.Accordion(open=True) if "column" in f"{error}" else gr.skip()


def _targets(model: str):
    """The model's linear layers as choices."""
    try:
        targets = get_trainings().targets(model)
    except UserError:
        return gr.skip()
    named = [(f"{t.name} ({t.count} × {t.inputs:,} → {t.outputs:,})", t.name) for t in targets]
    return gr.Dropdown(choices=[("all linear layers", ALL_LINEAR), *named])


def planned(form: TrainForm, preview: DataPreview | None) -> str:
    """The estimate of a run, or the error; "" while the data cannot be read."""
    if preview is None:
        return ""
    try:
        request = form.request()
        return train_preview.estimate(get_trainings().seen_by(None).estimate(request, preview), request.base)
    except UserError as error:
        return problem(error)
