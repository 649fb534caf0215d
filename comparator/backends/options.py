"""The options of a method: what they are, and how the notation's tokens become their values."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from comparator.core.errors import UserError

ONLY = "only"  # first in a list of names: the list replaces the method's own instead of adding to it
_MODULE = re.compile(r"[\w-]+(?:\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class Option:
    """One option of a method. `form` is how the notation writes it: `{name}={value}`, `{name}`, `g{value}`.

    Kind `names` takes names of modules, joined with +: libraries match them as regular expressions, so nothing else.
    """

    name: str
    help: str
    default: str | None
    kind: Literal["flag", "choice", "number", "names", "text"] = "choice"
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    form: str = "{name}={value}"
    transformers_default: str | None = None  # said in `variants` where it differs from ours

    @property
    def listed(self) -> str:
        """`example`; every choice where the value alone is what is written."""
        return ", ".join(self.choices) if self.choices and self.form == "{value}" else self.example

    @property
    def example(self) -> str:
        value = self.default if self.default is not None else (self.choices[0] if self.choices else "…")
        return self.form.format(name=self.name, value=value)


KV_CACHE = Option(
    "kv",
    "quantize transformers' KV cache with hqq. Default: the activations' dtype",
    None,
    choices=("int8", "int4"),
)
# Bits per value of a quantized KV cache: with a scale and a zero of 16 bits for 64 values (HQQ), a scale of 16 bits for 32 (ggml).
CACHE_BITS = {"int8": 8.5, "int4": 4.5, "q8_0": 8.5, "q4_0": 4.5}


@dataclass(frozen=True)
class Method:
    """One method of a backend. `precision` orders methods when a reference has to be chosen (higher: truer)."""

    name: str
    title: str
    summary: str
    options: tuple[Option, ...] = ()
    takes_source: bool = False
    precision: int = 0
    bits: float = 16.0
    presets: tuple[str, ...] = ()  # ready-made notations for the page, where the name alone is not enough
    decode: tuple[str, str] = ("", "")
    """A decode step of one sequence beside bf16 on a CPU and on an NVIDIA GPU, as docs/benchmarks.md and docs/formats.md measured it, or as
    follows where it is unpacked to bf16: "faster" or "slower" by 15 % and more, "similar", or "depends on the kernel". "" where it was not measured."""
    needs_source: bool = False  # it only loads what was quantized elsewhere, so no notation is ready-made

    @property
    def ready_notations(self) -> tuple[str, ...]:
        """What the page offers without asking for anything."""
        return () if self.needs_source else self.presets or (self.name,)


def match_option(method: Method, name: str, value: str | None) -> tuple[Option, str]:
    """One notation token → (option, its value as canonical text). Raises `UserError` on anything unknown."""
    for option in method.options:
        if option.kind == "flag":
            if name == option.name and value in (None, "true", "1", "yes", "on"):
                return option, "true"
            if name == option.name and value in ("false", "0", "no", "off"):
                return option, "false"
        elif "=" in option.form:
            if name == option.name:
                if value is None:
                    raise UserError(f"{option.name} needs a value.", f"Write {option.example}.")
                return option, _checked(option, value)
        elif value is None:
            before, _, after = option.form.partition("{value}")
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
                middle = name[len(before) : len(name) - len(after)]
                if middle in option.choices:
                    return option, middle
                if middle.lstrip("-").isdigit():
                    return option, _checked(option, middle)
    raise unknown_option(method, name if value is None else f"{name}={value}", name)


def _checked(option: Option, value: str) -> str:
    if option.kind == "number":
        try:
            number = float(value)
        except ValueError:
            raise UserError(
                f"{option.name} must be a number, not “{value}”.", f"Write {option.example}."
            ) from None
        low, high = option.minimum, option.maximum
        if number != number or (low is not None and number < low) or (high is not None and number > high):
            raise UserError(
                f"{option.name}={value} is out of range.",
                f"{option.name} must be at least {low:g}"
                + (f" to {high:g}." if high is not None else " up."),
            )
        return f"{number:g}"
    if option.kind == "names":
        names = {part for part in value.split("+") if part}
        if wrong := next((name for name in names if not _MODULE.fullmatch(name)), None):
            raise UserError(
                f"{option.name} takes names of modules; “{wrong[:80]}” is not one.",
                f"Join names or the ends of names with +, such as {option.name}=q_proj+mlp.down_proj.",
            )
        return "+".join(sorted(names, key=lambda name: (name != ONLY, name)))
    if option.choices and value not in option.choices:
        written = option.form.format(name=option.name, value=value)
        raise UserError(
            f"“{written}” is not a valid value.", f"{option.name} must be one of {', '.join(option.choices)}."
        )
    return value


def unknown_option(method: Method, written: str, name: str) -> UserError:
    known = [o.name for o in method.options]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not known:
        return UserError(
            f"{method.name} takes no options, so not “{written}” either.", f"Write just {method.name}."
        )
    meant = f"Did you mean {method.options[known.index(near[0])].example}? " if near else ""
    return UserError(
        f"{method.name} has no option “{written}”.",
        f"{meant}{method.name} takes {', '.join(o.listed for o in method.options)}.",
    )
