"""The Python API: keywords in, events or a `Comparison` out."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from comparator.backends import backend_for, resolve
from comparator.comparison.prompts import reader
from comparator.core.errors import UserError
from comparator.core.events import Done
from comparator.core.prompt_set import PromptSet
from comparator.core.request import (
    ChatTemplate,
    EvalSettings,
    GenerationSettings,
    Request,
    TaskRequest,
    parse_variables,
)
from comparator.core.result import Comparison
from comparator.core.settings import get_settings
from comparator.core.variant import Adapter, Cell, Variant, parse_adapter

if TYPE_CHECKING:
    from comparator.reporting.notebook import Running

DEFAULT_VARIANTS = ("bf16", "int8", "nf4")
WIKITEXT = "wikitext2"
AUTO = "auto"


def compare(
    prompt: str | Request,
    variants: Iterable[str | Variant] | None = None,
    model: str | None = None,
    adapters: Iterable[str | Adapter | None] = (),
    *,
    cancel: threading.Event | None = None,
    **settings: Any,
) -> Running:
    """Run a comparison; yields its events, `Done(comparison)` last. `cancel.set()` stops it. In a notebook the object shows
    the summary, and has `comparison`, `to_pandas()` and `plot()`, which run what is left of it first.

    `settings` are those of `request`. Raises `UserError` for a request that is wrong in itself; a column's own
    trouble is a `Failed` event. Closing the iterator stops the work.
    """
    from comparator.comparison.runner import compare as start
    from comparator.engines import get_engine
    from comparator.reporting.notebook import Running

    asked = prompt if isinstance(prompt, Request) else request(prompt, variants, model, adapters, **settings)
    return Running(start(asked, engine=get_engine(), cancel=cancel))


def run(
    prompt: str | Request,
    variants: Iterable[str | Variant] | None = None,
    model: str | None = None,
    adapters: Iterable[str | Adapter | None] = (),
    **settings: Any,
) -> Comparison:
    """The same, drained: the finished `Comparison`. `comparison.ok` says whether every column succeeded."""
    for event in compare(prompt, variants, model, adapters, **settings):
        if isinstance(event, Done):
            return event.comparison
    raise AssertionError("a comparison always ends with Done")


def default_variants(model: str | None = None) -> tuple[str, ...]:
    """bf16, int8 and nf4; of a model that is quantized already its one variant."""
    from comparator.backends import own_variant
    from comparator.engines import get_engine

    with contextlib.suppress(UserError):  # a model that cannot be found is reported when it is opened
        if own := own_variant(get_engine().facts(model or get_settings().model)):
            return (own.notation,)
    return DEFAULT_VARIANTS


def request(
    prompt: str | None = None,
    variants: Iterable[str | Variant] | None = None,
    model: str | None = None,
    adapters: Iterable[str | Adapter | None] = (),
    *,
    system: str | None = None,
    chat: bool | None = None,
    template: str | None = None,
    template_vars: Mapping[str, Any] | Iterable[str] = (),
    reference: str | Cell | None = None,
    fidelity: Literal["none", "prompt", "text"] | None = None,
    eval_text: str | Path | None = None,
    context: int = 512,
    stride: int | None = None,
    evict: bool = True,
    max_memory: str | None = None,
    parallel: bool = False,
    prompts: str | Path | PromptSet | None = None,
    task: str | Iterable[str] | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch: int = 1,
    resume: bool = True,
    calibration: str | Path | Iterable[str] | None = None,
    **settings: Any,
) -> Request:
    """A `Request` from plain values.

    Columns are `variants` × (no adapter and each of `adapters`); see `default_variants` for None. `model` defaults to COMPARATOR_MODEL. `reference`
    is one of the columns, as it is called there (`"bf16"`, `"bf16 + pirate"`). `eval_text` is a file, or
    "wikitext2"; naming one sets `fidelity` to "text". `stride` is the context's length where it is not given.
    `template` names one of the model's chat templates, `template_vars` are its variables: a mapping, or NAME=VALUE texts.
    `calibration` is what gptq columns that are made on the spot are rounded with: a file, "c4", "wikitext2" or the
    texts themselves. `parallel` runs columns on different devices of a Ray cluster at the same time.
    `prompts` is a set in place of `prompt`: a file, a built-in set by its name, or a `PromptSet` (docs/prompt-sets.md);
    `task`: names or folders of tasks of lm-evaluation-harness (docs/tasks.md), `limit` documents of each, with `fewshot` examples;
    `prompt` may then be left out, and is the first document's.
    `batch`: how many are decoded at once; `resume`: whether an interrupted run of it is taken up.
    `settings` are the fields of `GenerationSettings`; `repeats` may be "auto". Raises `UserError` for what cannot be understood; ranges are checked when the comparison starts.
    """
    if fidelity not in (None, "none", "prompt", "text"):
        raise UserError(f"There is no fidelity “{fidelity}”.", "Use none, prompt or text.")
    if calibration is not None:
        listed = default_variants(model) if variants is None else _listed(variants)
        variants = [_calibrated(v, calibration) for v in listed]
    if prompts is not None:
        if prompt is not None or system:
            raise UserError(
                "A prompt and a prompt set are given.",
                "Give only one of them; a set contains its own system prompts.",
            )
        prompts = prompts if isinstance(prompts, PromptSet) else reader.load(prompts)
        prompt, system = prompts.prompts[0].conversation()[-1].content, prompts.prompts[0].system
    if task is None and (limit, fewshot) != (None, None):
        raise UserError("There is no task to limit.", "Name one: task=…, or --task NAME.")
    return Request(
        prompts=prompts,
        task=None if task is None else TaskRequest(tuple(_listed(task)), limit, fewshot),
        batch=batch,
        resume=resume,
        model=model or get_settings().model,
        cells=cells(default_variants(model) if variants is None else variants, adapters),
        prompt=_text("prompt", "" if prompt is None and task is not None else prompt),
        system=_text("system prompt", system) if system else None,
        chat=chat,
        template=ChatTemplate(template, _variables(template_vars)),
        settings=_generation(settings),
        reference=reference if reference is None or isinstance(reference, Cell) else cell(reference),
        fidelity=fidelity or ("text" if eval_text else "prompt"),
        evaluation=_evaluation(eval_text, context, stride),
        evict=evict,
        max_memory=max_memory,
        parallel=parallel,
    )


def _variables(given: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    pairs = (
        [f"{name}={json.dumps(value)}" for name, value in given.items()]
        if isinstance(given, Mapping)
        else given
    )
    return parse_variables(_listed(pairs))


def _calibrated(variant: str | Variant, calibration: Any) -> Variant:
    known = resolve(variant)
    return backend_for(known).with_calibration(known, calibration)


def cells(
    variants: Iterable[str | Variant], adapters: Iterable[str | Adapter | None] = ()
) -> tuple[Cell, ...]:
    """The columns: grouped by variant, the one without an adapter first."""
    parsed = [
        parse_adapter(a) if isinstance(a, str) else a for a in _listed(adapters) if a not in (None, "none")
    ]
    each = [None, *parsed]
    return tuple(Cell(resolve(v), a) for v in _listed(variants) for a in each)


def cell(label: str) -> Cell:
    """`nf4:dq + pirate` → Cell: the way columns are called."""
    variant, plus, adapter = label.partition(" + ")
    return Cell(resolve(variant), parse_adapter(adapter) if plus else None)


def _listed(values: Any) -> list:
    """One string alone is one entry, not its letters."""
    return [values] if isinstance(values, (str, Variant, Adapter)) else list(values)


def _text(what: str, text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"The {what} must be text, not {type(text).__name__}.", "Pass a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"The {what} contains bytes that are not UTF-8.", "Save it as UTF-8 and try again."
        ) from None
    return text


def _generation(values: dict[str, Any]) -> GenerationSettings:
    known = [f.name for f in fields(GenerationSettings)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise UserError(f"There is no setting “{name}”.", f"{meant}The settings are {', '.join(known)}.")
    if (repeats := values.get("repeats")) is not None:
        values = {**values, "repeats": _repeats(repeats)}
    return GenerationSettings(**values)


def _repeats(value: int | str) -> int:
    """3, "3" or "auto", which is 0."""
    if value == AUTO:
        return 0
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"repeats is “{value}”.", "Use auto, or a whole number from 1 to 100.") from None


def _evaluation(eval_text: str | Path | None, context: int, stride: int | None) -> EvalSettings:
    stride = context if stride is None else stride
    for name, value in (("context", context), ("stride", stride)):
        if not isinstance(value, int) or value < 2 and name == "context" or value < 1:
            raise UserError(f"{name} is {value}.", "Give a number of tokens, for example 512.")
    if stride > context:
        raise UserError(
            f"The stride {stride} is longer than the context {context}.", "It would skip tokens; lower it."
        )
    if eval_text is None:
        return EvalSettings(context=context, stride=stride)
    if eval_text == WIKITEXT:
        return EvalSettings(name=WIKITEXT, context=context, stride=stride)
    path = Path(os.path.expanduser(eval_text))
    return EvalSettings(read_text(path, "evaluation text"), path.name, context, stride)


def read_text(path: Path, what: str) -> str:
    """A text file. Raises `UserError` if it is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not text in UTF-8.", "Save it as UTF-8, or choose another file."
        ) from None
    except OSError as error:
        raise UserError(
            f"The {what} {path} cannot be read: {error.strerror or error}.", "Check the path."
        ) from None
    if not text.strip():
        raise UserError(f"The {what} {path} is empty.", "Choose a file with text in it.")
    return text
