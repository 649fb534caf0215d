"""What the parts of the page share: the fields that make a request, and the places where results appear.

A part's `build(page)` lays itself out, adds its fields here and wires its own callbacks; `handlers.wire` connects
what spans several parts.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from comparator.settings import Settings
from comparator.ui.desk import Desk
from comparator.ui.state import Runs

# Every listener is private (not callable by API clients), shows no spinner over what is there, and is limited by
# nothing but the engine's own fair queue.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
# Answered at once, past the queue: for what must work while everything else is busy.
DIRECT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


@dataclass
class Page:
    """Filled in by the parts as they are built."""

    settings: Settings
    desk: Desk
    runs: Runs = field(default_factory=Runs)
    parts: Runs = field(default_factory=Runs)  # “Which part hurts most?”: stopped apart from a comparison
    evaluations: Runs = field(default_factory=Runs)  # of an adapter that was trained here
    fields: dict[str, gr.components.Component] = field(default_factory=dict)  # by name of `Form`'s field
    shown: gr.State | None = None  # Shown; tabs listen to its change
    cards: list[gr.HTML] = field(default_factory=list)
    summary: gr.HTML | None = None
    notice: gr.HTML | None = None
    status: gr.HTML | None = None  # the head line
    facts: gr.HTML | None = None  # what is known of the model
    describe: Callable[[str | None], str] | None = None  # a model's name → those facts
    residents: gr.HTML | None = None  # what is held in memory
    came_back: gr.HTML | None = None  # how much memory the last unloading gave back
    unload_all: gr.Button | None = None
    recording: gr.HTML | None = None  # what was opened, or why it could not be
    share: gr.HTML | None = None  # its link and what it can be saved as
    owner: gr.Textbox | None = None  # the visitor's key, from their browser
    adapter_names: gr.State | None = None  # the adapters in the list
    columns_off: gr.State | None = None  # columns that were switched off by hand
    refresh_history: Callable[[Any], None] | None = None  # lists the history anew after an event
    training: gr.HTML | None = None  # the line that says what is being trained
    training_clock: gr.Timer | None = None  # asks how it stands while something is
    run: gr.Button | None = None
    stop: gr.Button | None = None

    def on_comparison(self, render, outputs) -> None:
        """Call `render(shown)` whenever another comparison is shown, and put what it returns into `outputs`."""
        self.shown.change(render, inputs=[self.shown], outputs=outputs, **PRIVATE)


def _lenient(name: str, base: type, judge: Callable[[Any], Any]) -> Any:
    """A kind of `base` that takes what the browser sends and leaves it to be judged by who gets it.

    Choices change with what is shown, so what the browser sends may be older than they are; Gradio would show an
    error with all the choices in it. Made without the metaclass's own step, which writes a .pyi file beside this one.
    """
    members = {
        "preprocess": lambda self, payload: judge(payload),
        "is_template": True,
        "__module__": __name__,
    }
    return ABCMeta.__new__(type(base), name, (base,), members)


Choice = _lenient("Choice", gr.Dropdown, lambda sent: sent if isinstance(sent, str) else None)
Ticks = _lenient(
    "Ticks",
    gr.CheckboxGroup,
    lambda sent: [s for s in sent if isinstance(s, str)] if isinstance(sent, list) else [],
)


def picture(title: str) -> gr.Plot:
    """A figure on a card of its own, its title above it."""
    with gr.Column(elem_classes="picture"):
        gr.HTML(f"<h3>{title}</h3>", apply_default_css=False)
        return gr.Plot(show_label=False, container=False)
