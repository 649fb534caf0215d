"""What the parts of the page share: the fields of a request, and the components that show results.

The `build(page)` of a part lays it out, adds its fields here and connects its own callbacks; `handlers.wire` connects
what spans several parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from comparator.core.settings import Settings
from comparator.ui.admission import Admission
from comparator.ui.form import Runs, Shown
from comparator.ui.gradio_compat import unchecked
from comparator.ui.markup import render

# Every listener is private (API clients cannot call it), shows no spinner over its outputs, and is limited only by the
# engine's own queue.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
# Bypasses Gradio's queue: for what must respond while everything else is busy.
DIRECT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def html(value: str = "", **arguments: Any) -> gr.HTML:
    """HTML in the page's own style, without Gradio's."""
    return gr.HTML(value, apply_default_css=False, **arguments)


@dataclass
class Page:
    """Filled in by the parts while they are built."""

    settings: Settings
    admission: Admission
    runs: Runs = field(default_factory=Runs)
    sensitivity_runs: Runs = field(
        default_factory=Runs
    )  # sensitivity runs, stopped separately from a comparison
    sweep_runs: Runs = field(default_factory=Runs)
    evaluation_runs: Runs = field(default_factory=Runs)  # evaluations of trained adapters
    judge_runs: Runs = field(default_factory=Runs)
    export_runs: Runs = field(default_factory=Runs)
    fields: dict[str, gr.components.Component] = field(default_factory=dict)  # by name of `Form`'s field
    shown: gr.State | None = None  # holds a Shown; tabs listen to its changes
    cards: list[gr.HTML] = field(default_factory=list)
    summary: gr.HTML | None = None
    notice: gr.HTML | None = None
    status: gr.HTML | None = None  # the header line
    estimate: gr.HTML | None = None  # how long a run of the form would take
    facts: gr.HTML | None = None  # facts about the model
    examined: gr.HTML | None = None  # what examining its files found
    describe: Callable[..., str] | None = None  # a model's name, and `linked` → its facts as HTML
    linked: gr.State | None = None  # models and adapters that a link named: looked up once Run is pressed
    sizes: gr.JSON | None = None  # memory of each variant of the model once loaded, as written in the list
    residents: gr.HTML | None = None  # the resident variants
    unload_status: gr.HTML | None = None  # how much memory the last unload freed
    unload_all: gr.Button | None = None
    recording: gr.HTML | None = None  # banner of a saved comparison, or why it could not be opened
    share: gr.HTML | None = None  # its link, and the file formats for saving it
    owner: gr.Textbox | None = None  # the visitor's key, from their browser
    adapter_names: gr.State | None = None  # notations of the adapters in the list
    columns_off: gr.State | None = None  # columns that the visitor deselected
    refresh_history: Callable[[Any], None] | None = None  # refreshes the history list after an event
    training: gr.HTML | None = None  # one line about the training job that is running
    training_clock: gr.Timer | None = None  # polls its state while one is running
    at_once: list[tuple[Callable[[Shown], Any], list]] = field(
        default_factory=list
    )  # (render, its outputs) of what is drawn together with the cards of a saved comparison
    run: gr.Button | None = None
    stop: gr.Button | None = None

    def stop_runs(self, session: str | None) -> None:
        """Stop all that this visitor has running, of every tab."""
        for runs in vars(self).values():
            if isinstance(runs, Runs):
                runs.stop(session)

    def on_comparison(self, render, outputs, *, running: bool = False, at_once: bool = False) -> None:
        """Call `render(shown)` whenever another comparison is shown; its return values go to `outputs`.

        running: also while one runs, with the columns that have answered so far. Otherwise `render` gets a `Shown` without a
        comparison then: what an earlier run measured does not stand beside another one's answers.
        at_once: a saved comparison draws it with its cards (`saved_comparison.values`), two round trips earlier.
        """
        if at_once:
            self.at_once.append((render, outputs))

        def ready(shown: Shown):
            if at_once and shown.recorded:
                return [gr.skip()] * len(outputs)
            if shown.running and not running:
                return render(Shown())
            return render(shown)

        self.shown.change(ready, inputs=[self.shown], outputs=outputs, **PRIVATE)


Choice = unchecked("Choice", gr.Dropdown, lambda value: value if isinstance(value, str) else None)
Ticks = unchecked(
    "Ticks",
    gr.CheckboxGroup,
    lambda values: [v for v in values if isinstance(v, str)] if isinstance(values, list) else [],
)


def picture(title: str, empty: str = "") -> gr.Plot:
    """A plot on its own card, with a title above it and buttons that save it as a picture and as a table (plots.js).

    empty: what to do to get data, shown until there is some; for a card that is on the page before.
    """
    with gr.Column(elem_classes="picture"):
        html(render("picture.html", title=title, empty=empty))
        return gr.Plot(show_label=False, container=False)
