"""State of the page, without Gradio: the form, the running jobs, and the comparison that is shown."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from comparator.backends import backend_for, calibration, resolve
from comparator.comparison.prompts import reader
from comparator.core.errors import UserError
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
from comparator.core.variant import Adapter, Cell, Variant, parse_adapter
from comparator.engine.protocol import ignore

AUTO = "auto"
NO_ADAPTER = "none"
ONE_PROMPT, OWN_SET, TASK = "", "own", "task"  # `prompt_set`; else the name of a shipped set
MAX_ADAPTERS = 4  # besides “none”
_MOST_NAMES = 1_000  # variants, adapters or columns that a browser may list; the page lists some dozens
_MOST_CALIBRATION = 2_000_000  # characters of a pasted calibration; MOST_SAMPLES need some 150,000


@dataclass(frozen=True)
class Form:
    """Values of the page's fields when Run is pressed; names match `Page.fields`. Untrusted."""

    model: Any = None
    picked: Any = None  # {"on": [notation …], "reference": notation | "auto", "rows": […]}
    adapters: Any = (NO_ADAPTER,)  # notations and "none": every variant runs with each
    columns: Any = ()  # labels of the selected columns among `known_columns`
    known_columns: Any = ()
    prompt: Any = ""
    prompt_set: Any = ONE_PROMPT
    set_text: Any = ""
    task: Any = ""
    limit: Any = 100
    max_new_tokens: Any = 64
    temperature: Any = 0.0
    top_p: Any = 1.0
    top_k: Any = 0
    repetition_penalty: Any = 1.0
    seed: Any = 0
    repeats: Any = 0
    system: Any = ""
    chat: Any = AUTO  # auto | on | off
    template: Any = ""  # the name of a chat template
    template_vars: Any = ""  # NAME=VALUE, a line each
    decode: Any = AUTO
    fidelity: Any = "prompt"  # prompt | text | none
    eval_text: Any = ""
    context: Any = 512
    stride: Any = 512
    max_memory: Any = ""
    calibration: Any = ""  # for gptq variants quantized here: pasted text, c4 or wikitext2

    def request(self, max_columns: int, admit: Callable[[Request], None] = ignore) -> Request:
        """The request that the fields describe. Raises `UserError` naming the invalid field.

        `admit` gets it before anything of it is kept on the disk, as a pasted calibration is.
        """
        prompts = self.prompts()
        prompt = prompts.prompts[0].conversation()[-1].content if prompts else str(self.prompt or "")
        system = prompts.prompts[0].system if prompts else str(self.system or "").strip() or None
        if not prompt.strip():
            raise UserError("The prompt is empty.", "Type a prompt, then press Run.")
        model = str(self.model or "").strip()
        if not model:
            raise UserError(
                "No model is selected.", "Select one on the left, or type a Hub name such as user/model."
            )
        off = set(_strings(self.known_columns)) - set(_strings(self.columns))
        cells = tuple(cell for cell in self.cells() if cell.label not in off)
        if not cells:
            raise UserError("All columns are deselected.", "Select at least one under Columns.")
        if len(cells) > max_columns:
            raise UserError(
                f"{len(cells)} columns are selected; the limit is {max_columns}.",
                f"Deselect {len(cells) - max_columns} and press Run.",
            )
        reference = self.reference(cells)
        chat = {"on": True, "off": False}.get(str(self.chat))
        request = Request(
            model=model,
            cells=cells,
            prompt=prompt,
            system=system,
            prompts=prompts,
            task=self.asked_task(),
            chat=chat,
            template=ChatTemplate(
                str(self.template or "").strip() or None,
                parse_variables(line for line in str(self.template_vars or "").splitlines() if line.strip()),
            ),
            settings=self.generation(),
            reference=reference,
            fidelity=self.fidelity if self.fidelity in ("prompt", "text", "none") else "prompt",
            evaluation=self.evaluation(),
            max_memory=str(self.max_memory or "").strip() or None,
        )
        if len(str(self.calibration or "")) > _MOST_CALIBRATION:
            raise UserError(
                f"The calibration text has {len(str(self.calibration)):,} characters.",
                f"A few hundred thousand are plenty; the limit is {_MOST_CALIBRATION:,}.",
            )
        admit(request)
        calibrated = self.calibrated(cells)
        return replace(
            request,
            cells=calibrated,
            reference=calibrated[cells.index(reference)] if reference else None,
        )

    def prompts(self) -> PromptSet | None:
        """The chosen set; None for one prompt. Raises `UserError`."""
        if not isinstance(self.prompt_set, str) or self.prompt_set in (ONE_PROMPT, TASK):
            return None
        if self.prompt_set in reader.shipped():
            return reader.load(self.prompt_set)
        return reader.parse(str(self.set_text or ""))

    def asked_task(self) -> TaskRequest | None:
        """The tasks, separated by commas; None for prompts. A limit of 0 is none."""
        if self.prompt_set != TASK:
            return None
        names = tuple(filter(None, (name.strip() for name in str(self.task or "")[:2000].split(","))))
        return TaskRequest(names, _whole("Documents", self.limit or 0) or None)

    def calibrated(self, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
        """The columns, with the calibration text added to every variant that takes one and names none."""
        text = str(self.calibration or "").strip()
        if not text:
            return cells
        source = text if text in calibration.FROM_HUB else calibration.pasted(text)

        def one(cell: Cell) -> Cell:
            variant = cell.variant
            backend = backend_for(variant)
            if backend.calibration_option in dict(variant.options):
                return cell
            return replace(cell, variant=backend.with_calibration(variant, source))

        return tuple(one(cell) for cell in cells)

    def evaluation(self) -> EvalSettings:
        """The evaluation text; an empty field means the bundled one."""
        text = str(self.eval_text or "")
        settings = EvalSettings(context=_whole("Context", self.context), stride=_whole("Stride", self.stride))
        return replace(settings, text=text, name="your text") if text.strip() else settings

    def cells(self) -> tuple[Cell, ...]:
        """The selected variants, in the order of the list, each with every selected adapter."""
        names = _strings(self.picked.get("on")) if isinstance(self.picked, dict) else []
        selected = self.selected_adapters()
        cells = tuple(dict.fromkeys(Cell(resolve(name), adapter) for name in names for adapter in selected))
        if not cells:
            raise UserError(
                "No variant is selected.", "Select at least one on the left, for example bf16 and nf4."
            )
        return cells

    def selected_adapters(self) -> tuple[Adapter | None, ...]:
        """The selected adapters; None (no adapter) comes first. An empty selection means no adapter."""
        names = list(dict.fromkeys(_strings(self.adapters)))
        if sum(name != NO_ADAPTER for name in names) > MAX_ADAPTERS:
            raise UserError(
                f"More than {MAX_ADAPTERS} adapters are selected.", "Deselect some and press Run."
            )
        adapters = tuple(parse_adapter(name) for name in names if name != NO_ADAPTER)
        return (None, *adapters) if NO_ADAPTER in names or not adapters else adapters

    def reference(self, cells: tuple[Cell, ...]) -> Cell | None:
        """The column that the others are compared with; None: the most precise one."""
        name = self.picked.get("reference") if isinstance(self.picked, dict) else None
        if not isinstance(name, str) or name in ("", AUTO):
            return None
        variant = resolve(name)
        return next((cell for cell in cells if cell.variant == variant), None)

    def generation(self) -> GenerationSettings:
        return GenerationSettings(
            max_new_tokens=_whole("New tokens", self.max_new_tokens),
            temperature=_number("Temperature", self.temperature),
            top_p=_number("Top-p", self.top_p),
            top_k=_whole("Top-k", self.top_k),
            repetition_penalty=_number("Repetition penalty", self.repetition_penalty),
            seed=_whole("Seed", self.seed),
            repeats=_whole("Repeats", self.repeats),
            decode=str(self.decode or AUTO),
        )


def _strings(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)):
        return []
    if len(value) > _MOST_NAMES:
        raise UserError(f"{len(value):,} names are selected.", f"The limit is {_MOST_NAMES:,}.")
    return [v for v in value if isinstance(v, str)]


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} is empty or not a number.", "Enter a number under Settings.")
    return number


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number):
        raise UserError(f"{name} is {value}, but must be a whole number.", "Change it under Settings.")
    return int(number)


class Shown:
    """The comparison that the page shows. Compared and hashed by identity, so that Gradio's change detection does not
    walk through thousands of layer rows ten times a second."""

    def __init__(
        self,
        comparison: Comparison | None = None,
        recorded: bool = False,
        running: Request | None = None,
        load: Callable[[], Comparison] | None = None,
    ):
        """`load`: reads a saved comparison again whenever it is needed, so that a page that is left open holds none."""
        self._comparison = None if load else comparison
        self._load = load
        self.running = (
            running  # the request at work: only the columns that have answered so far, scored or not
        )
        self.recorded = recorded  # a saved comparison was opened: nothing of it is in memory here
        self.unloaded: dict[str, int] = {}  # column label → bytes freed

    @property
    def comparison(self) -> Comparison | None:
        """None where nothing is shown, and where it was deleted meanwhile."""
        if self._load is None:
            return self._comparison
        try:
            return self._load()
        except UserError:
            return None

    def again(self) -> Shown:
        """The same as another object, which Gradio takes for a change."""
        return Shown(self._comparison, self.recorded, self.running, self._load)

    def __deepcopy__(self, memo: dict) -> Shown:
        return self


@dataclass
class Runs:
    """The running jobs, by visitor. Stop and closing the tab both end them here. Thread-safe."""

    _stops: dict[str, threading.Event] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, session: str) -> threading.Event:
        """A new stop signal for this visitor; stops the job that was still running."""
        stop = threading.Event()
        with self._lock:
            before = self._stops.get(session)
            self._stops[session] = stop
        if before:
            before.set()
        return stop

    def stop(self, session: str | None) -> bool:
        """Stop this visitor's job; returns whether there was one."""
        with self._lock:
            stop = self._stops.get(session or "")
        if stop:
            stop.set()
        return stop is not None

    def going(self, session: str | None) -> bool:
        """Whether this visitor has a job running."""
        with self._lock:
            return (session or "") in self._stops

    def end(self, session: str, stop: threading.Event) -> None:
        with self._lock:
            if self._stops.get(session) is stop:
                del self._stops[session]


def variant_of(notation: str) -> Variant | None:
    """The variant of a notation, or None if the notation is invalid."""
    try:
        return resolve(notation)
    except UserError:
        return None
