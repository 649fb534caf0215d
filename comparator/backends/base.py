"""The contract of a backend: one file, one class, one way to load a model.

To add one: write `backends/yourname.py` with a subclass of `Backend`. Everything else (the page's choices,
`python -m comparator variants`, the notation's options, the docs' table, the contract test) follows from the
class. Importing a backend must be cheap: torch and the method's own library load inside `load`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from comparator.notation import sort_options
from comparator.types import LayerRow, Problem, Variant

if TYPE_CHECKING:
    from comparator.sources import Checkpoint

DTYPES = ("fp32", "fp16", "bf16")
Progress = Callable[
    [float | None, str], None
]  # fraction 0..1 or None, and what is being done; may raise Stopped


@dataclass(frozen=True)
class Option:
    """One option of a method. `form` is how the notation writes it: `{name}={value}`, `{name}`, `g{value}`."""

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
    def example(self) -> str:
        value = self.default if self.default is not None else (self.choices[0] if self.choices else "…")
        return self.form.format(name=self.name, value=value)


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
    presets: tuple[str, ...] = ()  # ready-made notations for the page


@dataclass(frozen=True)
class Placement:
    """Where a variant goes: one device, or accelerate's limits per device (`max_memory`, bytes)."""

    device: str = "cpu"
    max_memory: dict[int | str, int] | None = None


@dataclass
class LoadedModel:
    """What a backend hands back: the model in eval mode on its device, and what a reader must know about it."""

    model: Any
    kernel: str
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Logical:
    """A packed tensor's meaning: its dtype in words ("nf4"), its shape, and the dtype it is multiplied in."""

    dtype: str
    shape: tuple[int, ...]
    compute_dtype: str


class Backend:
    """Subclass this. `load` is the one method that has to be written."""

    name: ClassVar[str]
    methods: ClassVar[tuple[Method, ...]]
    requires: ClassVar[tuple[str, ...]] = ()  # import names of what must be installed

    def unavailable(self) -> str | None:
        """Why this backend cannot be used here, or None. Imports nothing heavy."""
        missing = [name for name in self.requires if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} is not installed: pip install {' '.join(missing)}" if missing else None

    def method(self, name: str) -> Method:
        return next(m for m in self.methods if m.name == name)

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        """Refuse combinations that make no sense. `values` holds every option, defaults included."""

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        """Fill in what only the model can tell (a group size, say). Raises `Problem` where it does not fit.

        `progress` is told where this takes long (a ready-made checkpoint is downloaded); it may raise `Stopped`.
        """
        return variant

    def silence(self) -> None:
        """Keep the method's libraries out of the terminal; called before they are imported."""

    def prepare(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> None:
        """What is done once and kept (quantizing, compiling a kernel), before load time and load peak are taken."""

    def here(self) -> list[str]:
        """Lines for `variants` on what is possible on this machine. Imports nothing heavy."""
        return []

    def needed_bytes(self, variant: Variant, checkpoint: Checkpoint) -> int:
        """Bytes that the loaded variant will hold on its device; used to refuse before loading, never shown
        as a measurement."""
        raise NotImplementedError

    def load(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> LoadedModel:
        raise NotImplementedError

    def quant_state(self, module: Any) -> dict[str, Any]:
        """Tensors that a quantized weight of `module` needs beside its values: absmax, codebooks, scales, zeros …

        Empty for a module that this backend did not quantize.
        """
        return {}

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        """What the stored `parameter` of `module` means; None where storage and meaning are the same."""
        return None

    def dequantize(self, module: Any) -> Any | None:
        """The weight (out, in) of a module that this backend quantized, as a float32 tensor; None otherwise."""
        return None

    def code(
        self, variant: Variant, placement: Placement, *, tied: bool = False, kernel: str | None = None
    ) -> tuple[list[str], list[str], list[str]]:
        """Plain transformers code that loads the same: (import lines, set-up lines, keyword arguments of
        `from_pretrained` as source text). `tied`: the model's head shares its weights with the embedding.
        `kernel`: what multiplied, as the column names it."""
        raise NotImplementedError

    def code_weights(self, variant: Variant) -> str | None:
        """Source text of what `from_pretrained` loads, where that is not the comparison's own model."""
        return repr(variant.source) if variant.source else None

    def code_comment(self, variant: Variant, model: str) -> list[str]:
        """Comment lines above the set-up: what has to be done first. Quotes nothing unescaped."""
        return []

    def code_after(self, variant: Variant, layers: tuple[LayerRow, ...]) -> list[str]:
        """Lines of plain code to run after `from_pretrained`, where this backend had to do more to make it run."""
        return []

    # ------------------------------------------------------------ options, the same for every backend

    def values(self, variant: Variant) -> dict[str, str]:
        """Every option of the variant's method as text, defaults filled in ("" where there is none)."""
        method = self.method(variant.method)
        values = {o.name: o.default if o.default is not None else "" for o in method.options}
        for name, value in variant.options:
            option, text = match_option(method, name, value)
            values[option.name] = text
        return values

    def given(self, variant: Variant) -> dict[str, str]:
        """Only the options that the notation names, as text."""
        method = self.method(variant.method)
        return {o.name: text for o, text in (match_option(method, n, v) for n, v in variant.options)}

    def canonical(self, variant: Variant) -> Variant:
        """Validate, drop defaults, sort. Raises `Problem` that names the option and lists the valid ones."""
        method = self.method(variant.method)
        if variant.source and not method.takes_source:
            raise Problem(
                f"{method.name} takes no source after an @.",
                "It quantizes the comparison's own model as it loads.",
            )
        kept: dict[str, str | None] = {}
        for name, value in variant.options:
            option, text = match_option(method, name, value)
            if text == option.default:
                continue
            token = option.form.format(name=option.name, value=text)
            key, equals, rest = token.partition("=")
            kept[key] = rest if equals else None
        result = Variant(variant.method, variant.source, variant.revision, sort_options(kept))
        self.check(result, self.values(result))
        return result


def match_option(method: Method, name: str, value: str | None) -> tuple[Option, str]:
    """One notation token → (option, its value as canonical text). Raises `Problem` on anything unknown."""
    for option in method.options:
        if option.kind == "flag":
            if name == option.name and value in (None, "true", "1", "yes", "on"):
                return option, "true"
            if name == option.name and value in ("false", "0", "no", "off"):
                return option, "false"
        elif "=" in option.form:
            if name == option.name:
                if value is None:
                    raise Problem(f"{option.name} needs a value.", f"Write {option.example}.")
                return option, _checked(option, value)
        elif value is None:
            before, _, after = option.form.partition("{value}")
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
                middle = name[len(before) : len(name) - len(after)]
                if middle.lstrip("-").isdigit():
                    return option, _checked(option, middle)
    raise unknown_option(method, name if value is None else f"{name}={value}", name)


def _checked(option: Option, value: str) -> str:
    if option.kind == "number":
        try:
            number = float(value)
        except ValueError:
            raise Problem(
                f"{option.name} must be a number, not “{value}”.", f"Write {option.example}."
            ) from None
        low, high = option.minimum, option.maximum
        if number != number or (low is not None and number < low) or (high is not None and number > high):
            raise Problem(
                f"{option.name}={value} is out of range.",
                f"{option.name} goes from {low:g}" + (f" to {high:g}." if high is not None else " up."),
            )
        return f"{number:g}"
    if option.kind == "names":
        return "+".join(sorted({part for part in value.split("+") if part}))
    if option.choices and value not in option.choices:
        written = option.form.format(name=option.name, value=value)
        raise Problem(
            f"“{written}” is not possible.", f"{option.name} is one of {', '.join(option.choices)}."
        )
    return value


def unknown_option(method: Method, written: str, name: str) -> Problem:
    import difflib

    known = [o.name for o in method.options]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not known:
        return Problem(
            f"{method.name} takes no options, so not “{written}” either.", f"Write just {method.name}."
        )
    meant = f"Did you mean {method.options[known.index(near[0])].example}? " if near else ""
    return Problem(
        f"{method.name} has no option “{written}”.",
        f"{meant}{method.name} takes {', '.join(o.example for o in method.options)}.",
    )


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
