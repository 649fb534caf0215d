"""The values of the Train tab's fields → a training request. Plain, untrusted data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.training.settings import ALL_LINEAR, SETTINGS, Setting, TrainSettings
from comparator.training.types import FORMS, DataSource, TrainRequest

FIRST = (
    "epochs",
    "max_steps",
    "learning_rate",
    "rank",
    "batch_size",
    "max_length",
    "held_back",
)  # the others are under “More settings”
COLUMNS = {
    "messages": ("chat",),
    "prompt": ("prompt",),
    "completion": ("prompt",),
    "text": ("text",),
}  # role → the data formats that have it
AUTO = "auto"
MAX_TEXT = 1_000  # characters of a name or a path
_MOST_NAMES = 1_000  # of layers; a model has some ten kinds
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Uploaded:
    """An uploaded file: where Gradio stored it, and its original name."""

    path: str
    name: str


@dataclass(frozen=True)
class TrainForm:
    """The values of the fields. `uploaded` is used while `data` is still its name."""

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
        """Where the samples come from. Raises `UserError` if no data is selected."""
        text = _text(self.data)
        if not text:
            raise UserError(
                "No data is selected.",
                "Press “pirate” for the built-in example, upload a file, or enter a name.",
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
            raise UserError(
                "No model is selected.", "Select one under Model, or type a Hub name such as user/model."
            )
        return model

    def train_settings(self) -> TrainSettings:
        """The settings. Raises `UserError` naming the invalid field."""
        return replace(
            TrainSettings(),
            **{
                name: _value(_BY_NAME[name], value)
                for name, value in self.settings.items()
                if name in _BY_NAME
            },
        )

    def request(self) -> TrainRequest:
        """The training request. Raises `UserError`."""
        base = _text(self.base)
        if not base:
            raise UserError(
                "No base is selected.", "Select a variant to train on; nf4:dq needs the least memory."
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


def _value(setting: Setting, value: Any) -> Any:
    """A field's value → the value in `TrainSettings`. Raises `UserError`."""
    if setting.kind == "bool":
        return value is True
    if setting.kind == "bool-or-auto":
        return {"on": True, "off": False}.get(value)
    if setting.kind == "choice":
        if value not in setting.choices:
            raise UserError(
                f"{setting.title} is “{str(value)[:60]}”.", f"Select one of {', '.join(setting.choices)}."
            )
        return value
    if setting.kind == "names":
        if isinstance(value, str):
            value = value[: 10 * MAX_TEXT].replace(",", " ").split()
        listed = value[:_MOST_NAMES] if isinstance(value, (list, tuple)) else ()
        names = tuple(
            dict.fromkeys(n for name in listed if isinstance(name, str) and (n := name.strip()[:MAX_TEXT]))
        )
        if not names:
            raise UserError(
                f"{setting.title} is empty.", f"Select {ALL_LINEAR}, or one of the model's layers."
            )
        return names if len(names) == 1 else tuple(n for n in names if n != ALL_LINEAR)
    return _number(setting, value)


def _number(setting: Setting, value: Any) -> float | int:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{setting.title} is empty or not a number.",
            f"Enter a number; the default is {setting.default:g}.",
        )
    if setting.kind == "int" and number != int(number):
        raise UserError(
            f"{setting.title} is {number:g}, but must be a whole number.",
            f"Enter {int(number)}, for example.",
        )
    low, high = setting.minimum, setting.maximum
    if (low is not None and number < low) or (high is not None and number > high):
        raise UserError(
            f"{setting.title} is {number:g}.",
            f"It must be between {low or 0:,.12g} and {high:,.12g}."
            if high is not None
            else f"It must be at least {low:,.12g}.",
        )
    return int(number) if setting.kind == "int" else number
