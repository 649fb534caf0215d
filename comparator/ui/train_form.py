"""The Train tab's fields → what is asked for. Plain data, nothing of it trusted; knows nothing of gradio."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from comparator.backends import resolve
from comparator.training.settings import ALL_LINEAR, SETTINGS, Setting, TrainSettings
from comparator.training.types import FORMS, DataSource, TrainRequest
from comparator.types import Problem

FIRST = (
    "epochs",
    "max_steps",
    "learning_rate",
    "rank",
    "batch_size",
    "max_length",
    "held_back",
)  # the others are under “more”
COLUMNS = {
    "messages": ("chat",),
    "prompt": ("prompt",),
    "completion": ("prompt",),
    "text": ("text",),
}  # role → the forms that have it
AUTO = "auto"
MAX_TEXT = 1_000  # of a name or a path
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Uploaded:
    """A file that came through the page: where Gradio put it, and what people call it."""

    path: str
    name: str


@dataclass(frozen=True)
class TrainForm:
    """The fields as they stand. `uploaded` counts as long as `data` is still its name."""

    model: Any = None
    base: Any = None
    data: Any = None
    uploaded: Uploaded | None = None
    form: Any = AUTO
    columns: dict[str, Any] = field(default_factory=dict)  # role → column
    settings: dict[str, Any] = field(default_factory=dict)  # by name of `TrainSettings`' field
    name: Any = ""
    prompt: Any = ""
    system: Any = ""

    def source(self) -> DataSource:
        """Where the samples come from. Raises `Problem` where nothing is named."""
        text = _text(self.data)
        if not text:
            raise Problem(
                "No data is chosen.",
                "Press “pirate” for the built-in example, upload a file, or type a name.",
            )
        form = self.form if self.form in FORMS else None
        named = tuple(
            (role, name)
            for role, forms in COLUMNS.items()
            if (name := _text(self.columns.get(role))) and (form is None or form in forms)
        )
        if self.uploaded and text == self.uploaded.name:
            return DataSource(self.uploaded.path, form, named, name=self.uploaded.name, uploaded=True)
        return DataSource(text, form, named)

    def chosen_model(self) -> str:
        model = _text(self.model)
        if not model:
            raise Problem(
                "No model is chosen.", "Pick one under Model, or type a Hub name such as user/model."
            )
        return model

    def train_settings(self) -> TrainSettings:
        """Raises `Problem` naming the field that is wrong."""
        return replace(
            TrainSettings(),
            **{
                name: _value(_BY_NAME[name], given)
                for name, given in self.settings.items()
                if name in _BY_NAME
            },
        )

    def request(self) -> TrainRequest:
        """What Train asks for. Raises `Problem`."""
        base = _text(self.base)
        if not base:
            raise Problem(
                "No base is chosen.", "Choose a variant to train on; nf4:dq takes the least memory."
            )
        return TrainRequest(
            data=self.source(),
            base=resolve(base).notation,
            model=self.chosen_model(),
            settings=self.train_settings(),
            name=_text(self.name) or None,
            sample_prompt=str(self.prompt or "").strip() or None,
            system=str(self.system or "").strip() or None,
        )


def _text(value: Any) -> str:
    return value.strip()[:MAX_TEXT] if isinstance(value, str) else ""


def _value(setting: Setting, given: Any) -> Any:
    """A field's value as `TrainSettings` has it."""
    if setting.kind == "bool":
        return given is True
    if setting.kind == "bool-or-auto":
        return {"on": True, "off": False}.get(given)
    if setting.kind == "choice":
        if given not in setting.choices:
            raise Problem(
                f"{setting.title} is “{str(given)[:60]}”.", f"Choose one of {', '.join(setting.choices)}."
            )
        return given
    if setting.kind == "names":
        listed = given if isinstance(given, (list, tuple)) else str(given or "").replace(",", " ").split()
        names = tuple(
            dict.fromkeys(n for name in listed if isinstance(name, str) and (n := name.strip()[:MAX_TEXT]))
        )
        if not names:
            raise Problem(f"{setting.title} is empty.", f"Choose {ALL_LINEAR}, or one of the model's layers.")
        return names if len(names) == 1 else tuple(n for n in names if n != ALL_LINEAR)
    return _number(setting, given)


def _number(setting: Setting, given: Any) -> float | int:
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Problem(
            f"{setting.title} is empty or not a number.",
            f"Type a number; it is {setting.default:g} at first.",
        )
    if setting.kind == "int" and number != int(number):
        raise Problem(
            f"{setting.title} is {number:g}, and must be a whole number.", f"{int(number)}, for instance."
        )
    low, high = setting.minimum, setting.maximum
    if (low is not None and number < low) or (high is not None and number > high):
        raise Problem(
            f"{setting.title} is {number:g}.",
            f"It goes from {low or 0:,.12g} to {high:,.12g}."
            if high is not None
            else f"The least is {low:,.12g}.",
        )
    return int(number) if setting.kind == "int" else number
