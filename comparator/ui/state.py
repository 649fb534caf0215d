"""What the page knows, without Gradio: the filled-in form, the runs under way, the comparison that is shown."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from typing import Any

from comparator.backends import resolve
from comparator.notation import parse_adapter
from comparator.types import (
    Adapter,
    Cell,
    Comparison,
    EvalSettings,
    GenerationSettings,
    Problem,
    Request,
    Variant,
)

AUTO = "auto"
NO_ADAPTER = "none"
MAX_ADAPTERS = 4  # beside “none”


@dataclass(frozen=True)
class Form:
    """The page's fields as they stand when Run is pressed; names match `Page.fields`. Nothing is trusted."""

    model: Any = None
    picked: Any = None  # {"on": [notation …], "reference": notation | "auto", "rows": […]}
    adapters: Any = (NO_ADAPTER,)  # notations and "none": every variant runs with each
    columns: Any = ()  # labels of the columns that are on, among `known_columns`
    known_columns: Any = ()
    prompt: Any = ""
    max_new_tokens: Any = 64
    temperature: Any = 0.0
    top_p: Any = 1.0
    top_k: Any = 0
    repetition_penalty: Any = 1.0
    seed: Any = 0
    repeats: Any = 1
    system: Any = ""
    chat: Any = AUTO  # auto | on | off
    decode: Any = AUTO
    fidelity: Any = "prompt"  # prompt | text | none
    eval_text: Any = ""
    context: Any = 512
    stride: Any = 512
    max_memory: Any = ""
    calibration: Any = ""  # of gptq columns that are made here: pasted texts, c4 or wikitext2

    def request(self, max_columns: int) -> Request:
        """The comparison that the fields ask for. Raises `Problem` naming the field that is wrong."""
        prompt = str(self.prompt or "")
        if not prompt.strip():
            raise Problem("The prompt is empty.", "Type something for the model to answer, then press Run.")
        model = str(self.model or "").strip()
        if not model:
            raise Problem(
                "No model is chosen.", "Pick one on the left, or type a Hub name such as user/model."
            )
        off = set(_strings(self.known_columns)) - set(_strings(self.columns))
        cells = tuple(cell for cell in self.cells() if cell.label not in off)
        if not cells:
            raise Problem("Every column is switched off.", "Tick one under Columns.")
        if len(cells) > max_columns:
            raise Problem(
                f"{len(cells)} columns are ticked; {max_columns} fit side by side.",
                f"Untick {len(cells) - max_columns} and press Run.",
            )
        calibrated, reference = self.calibrated(cells), self.reference(cells)
        chat = {"on": True, "off": False}.get(str(self.chat))
        return Request(
            model=model,
            cells=calibrated,
            prompt=prompt,
            system=str(self.system).strip() or None if self.system else None,
            chat=chat,
            settings=self.generation(),
            reference=calibrated[cells.index(reference)] if reference else None,
            fidelity=self.fidelity if self.fidelity in ("prompt", "text", "none") else "prompt",
            evaluation=self.evaluation(),
            max_memory=str(self.max_memory or "").strip() or None,
        )

    def calibrated(self, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
        """The columns with the calibration in the notation of every gptq that is made here and names none."""
        from comparator.gptq import calibration

        text = str(self.calibration or "").strip()
        if not text:
            return cells
        source = text if text in calibration.FROM_HUB else calibration.pasted(text)

        def one(cell: Cell) -> Cell:
            variant = cell.variant
            if variant.method != "gptq" or variant.source or "cal" in dict(variant.options):
                return cell
            return replace(cell, variant=calibration.take_in(variant, source))

        return tuple(one(cell) for cell in cells)

    def evaluation(self) -> EvalSettings:
        """The longer text; an empty field means the one that comes with this project."""
        text = str(self.eval_text or "")
        given = EvalSettings(
            context=_whole("The evaluation's context", self.context), stride=_whole("Its stride", self.stride)
        )
        return replace(given, text=text, name="your text") if text.strip() else given

    def cells(self) -> tuple[Cell, ...]:
        """The ticked variants, in the order of the list, each with every ticked adapter."""
        names = _strings(self.picked.get("on")) if isinstance(self.picked, dict) else []
        worn = self.worn()
        cells = tuple(dict.fromkeys(Cell(resolve(name), adapter) for name in names for adapter in worn))
        if not cells:
            raise Problem(
                "No variant is ticked.", "Tick at least one on the left; bf16 and nf4 make a good pair."
            )
        return cells

    def worn(self) -> tuple[Adapter | None, ...]:
        """The ticked adapters; None, for no adapter, comes first. Nothing ticked means no adapter."""
        names = list(dict.fromkeys(_strings(self.adapters)))
        if sum(name != NO_ADAPTER for name in names) > MAX_ADAPTERS:
            raise Problem(f"More than {MAX_ADAPTERS} adapters are ticked.", "Untick some and press Run.")
        found = tuple(parse_adapter(name) for name in names if name != NO_ADAPTER)
        return (None, *found) if NO_ADAPTER in names or not found else found

    def reference(self, cells: tuple[Cell, ...]) -> Cell | None:
        """The column that the others are measured against; None: the most precise one."""
        name = self.picked.get("reference") if isinstance(self.picked, dict) else None
        if not isinstance(name, str) or name in ("", AUTO):
            return None
        wanted = resolve(name)
        return next((cell for cell in cells if cell.variant == wanted), None)

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
    return [v for v in value if isinstance(v, str)] if isinstance(value, (list, tuple)) else []


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Problem(f"{name} is empty or not a number.", "Type a number under Settings.")
    return number


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number):
        raise Problem(f"{name} is {value}, and must be a whole number.", "Correct it under Settings.")
    return int(number)


class Shown:
    """The comparison that the page shows now. One object per comparison: it compares and hashes by identity,
    which keeps Gradio's change detection from walking through thousands of layer rows ten times a second."""

    def __init__(self, comparison: Comparison | None = None, recorded: bool = False):
        self.comparison = comparison
        self.recorded = recorded  # opened, not just measured: nothing of it is in memory here
        self.unloaded: dict[str, int] = {}  # column label → bytes that came back

    def __deepcopy__(self, memo: dict) -> Shown:
        return self


@dataclass
class Runs:
    """The runs under way, by visitor. Stop and a closed tab both come here; safe from any thread."""

    _stops: dict[str, threading.Event] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, session: str) -> threading.Event:
        """A new stop signal for this visitor; a run that was still going is stopped."""
        stop = threading.Event()
        with self._lock:
            before = self._stops.get(session)
            self._stops[session] = stop
        if before:
            before.set()
        return stop

    def stop(self, session: str | None) -> bool:
        """Ask this visitor's run to stop; whether there was one."""
        with self._lock:
            stop = self._stops.get(session or "")
        if stop:
            stop.set()
        return stop is not None

    def going(self, session: str | None) -> bool:
        """Whether this visitor's page has a run under way."""
        with self._lock:
            return (session or "") in self._stops

    def end(self, session: str, stop: threading.Event) -> None:
        with self._lock:
            if self._stops.get(session) is stop:
                del self._stops[session]


def variant_of(notation: str) -> Variant | None:
    """The variant that a notation names, or None where it is wrong."""
    try:
        return resolve(notation)
    except Problem:
        return None
