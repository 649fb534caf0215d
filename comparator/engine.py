"""The only door to torch: load, generate, layers, unload, by handle. Models never leave it.

One dedicated thread owns all torch work, loading included: called from changing threads the same decode loop
runs at half speed on a CPU. Importing this module imports no torch; `start()` does that in the background.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from comparator.errors import explained
from comparator.messages import Generation, Loaded, Progress, Prompt
from comparator.seam import AnyEngine, InOnePlace
from comparator.settings import Settings, get_settings
from comparator.turns import Turns
from comparator.types import (
    Adapter,
    Cell,
    Chunk,
    EngineState,
    Environment,
    GenerationSettings,
    LayerRow,
    ModelFacts,
    Problem,
    Resident,
    Stopped,
    Variant,
)
from comparator.worker import Worker

if TYPE_CHECKING:
    from comparator.pool import Slot
    from comparator.scoring_tasks import Task


class Engine(InOnePlace):
    """Every method is safe from any thread; the work happens on the engine's own, one piece after another."""

    def __init__(self, settings: Settings | None = None):
        self.settings = settings or get_settings()
        self.turns = Turns()
        self._worker = Worker()
        self._pool: Any = None
        self._ready = False
        self._device = "cpu"
        self._device_name = ""
        self._residents: tuple[tuple[Resident, Any], ...] = ()
        self._tokenizers: dict[str, Any] = {}
        self._checkpoints: dict[str, Any] = {}
        self._started: Future | None = None
        self._lock = threading.Lock()

    # ------------------------------------------------------------ the thread

    def start(self) -> Future:
        """Begin importing torch and transformers in the background. Returns at once."""
        with self._lock:
            if self._started is None:
                self._started = self._worker.submit(self._import)
            return self._started

    def _import(self) -> None:
        from comparator.backends.loading import import_quietly

        import_quietly()
        import torch
        import transformers

        from comparator.metrics.environment import read
        from comparator.pool import Pool, pick_device

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_grad_enabled(False)
        self._device = pick_device()
        self._device_name = read(self._device).device or self._device
        self._pool = Pool(self.settings, on_change=self._remember)
        self._ready = True

    def _remember(self) -> None:
        """A picture of the pool that other threads can read without waiting."""
        self._residents = tuple(self._pool.residents())

    def _call(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the engine's thread and wait for it."""
        self.start()
        return self._worker.call(work)

    def _stream(self, work: Callable[[Callable[[Any], None]], Any], cancel: threading.Event) -> Iterator[Any]:
        """Run `work(emit)` on the engine's thread and yield what it emits, then what it returns."""
        self.start()
        return self._worker.stream(work, cancel)

    # ------------------------------------------------------------ what is there

    def state(self) -> EngineState:
        """What the page's head line shows. Returns at once, also while the device is busy."""
        total = free = None
        if self._ready:
            from comparator.metrics.memory import device_total_and_free

            total, free = device_total_and_free(self._device)
        now = time.monotonic()
        return EngineState(
            device=self._device_name or "starting …",
            total_bytes=total,
            free_bytes=free,
            budget_bytes=self.settings.budget_bytes,
            waiting=self.turns.waiting,
            busy=self.turns.busy,
            ready=self._ready,
            residents=tuple(replace(r, idle_s=now - slot.last_used) for r, slot in self._residents),
        )

    def facts(self, model: str, progress: Callable[[float | None, str], None] | None = None) -> ModelFacts:
        """What is known of a model before loading; downloads no weights and needs no torch. Raises `Problem`."""
        from comparator.sources import look_up

        if model in self._checkpoints:
            return self._checkpoints[model].facts()
        return look_up(model, settings=self.settings)

    def _checkpoint(self, model: str, progress=None, fresh: bool = False) -> Any:
        from comparator.sources import open_checkpoint

        if fresh or model not in self._checkpoints:
            self._checkpoints[model] = open_checkpoint(model, progress=progress, settings=self.settings)
        return self._checkpoints[model]

    def environment(self) -> Environment:
        from comparator.metrics.environment import read

        return self._call(lambda: read(self._device))

    def unload(self, handle: str | None = None) -> int:
        """Unload one variant, or all with None. Returns the bytes that came back; waits for its turn."""
        return self._call(lambda: self._pool.unload(handle)) if self._started else 0

    # ------------------------------------------------------------ a comparison's steps

    def open(self, model: str, cancel: threading.Event) -> Iterator[Progress | ModelFacts]:
        """Find, download or convert the model, with progress; the last item is its facts."""

        def work(emit):
            def told(fraction, message):
                if cancel.is_set():
                    raise Stopped
                emit(Progress(fraction, message))

            checkpoint = self._checkpoint(model, told, fresh=True)
            checkpoint.require_full_precision()
            return checkpoint.facts()

        return self._stream(work, cancel)

    def complete(self, model: str, cell: Cell, cancel: threading.Event) -> Iterator[Progress | Cell]:
        """The cell with what only the model can tell filled in (a group size, say); it is the last item, and comes
        with progress where a ready-made checkpoint is downloaded. Raises `Problem` or `Stopped`."""
        from comparator.backends import backend_for

        def work(emit):
            def told(fraction, message):
                if cancel.is_set():
                    raise Stopped
                emit(Progress(fraction, message))

            backend = backend_for(cell.variant)
            with explained(f"look at {cell.variant.notation}"):
                return replace(cell, variant=backend.complete(cell.variant, self._checkpoint(model), told))

        return self._stream(work, cancel)

    def encode(self, model: str, prompt: str, system: str | None, chat: bool | None) -> Prompt:
        """The prompt's token ids. Raises `Problem` (empty, no template, …)."""
        from comparator.text import encode

        def work():
            ids, used = encode(self._tokenizer(self._checkpoint(model)), prompt, system, chat)
            return Prompt(tuple(ids), used)

        return self._call(work)

    def needed_bytes(self, model: str, variant: Variant) -> int:
        """About what it will take on its device. Raises `Problem`."""
        from comparator.backends import backend_for

        return self._call(lambda: backend_for(variant).needed_bytes(variant, self._checkpoint(model)))

    def _tokenizer(self, checkpoint: Any) -> Any:
        key = str(checkpoint.path)
        if key not in self._tokenizers:
            from transformers import AutoTokenizer

            try:
                self._tokenizers[key] = AutoTokenizer.from_pretrained(
                    key, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:
                raise Problem(
                    f"The tokenizer of {checkpoint.source} cannot be read: {str(error).splitlines()[0][:200]}",
                    "Check that the folder holds tokenizer.json or the files of a slow tokenizer.",
                ) from error
        return self._tokenizers[key]

    def load(
        self,
        model: str,
        variant: Variant,
        cancel: threading.Event,
        *,
        max_memory: dict[int | str, int] | None = None,
        evict: bool = True,
        keep: frozenset[str] = frozenset(),
        adapter: Adapter | None = None,
    ) -> Iterator[Progress | Loaded]:
        """Make a variant resident, fitted with the adapter; the last item is `Loaded`. An adapter is judged before
        anything is loaded. Raises `Problem` or `Stopped`."""

        def work(emit):
            from comparator.running import describe

            last = [0.0, ""]

            def told(fraction, message):
                now = time.monotonic()
                if message != last[1] or now - last[0] > 0.1:  # a few a second are enough for a person
                    last[:] = [now, message]
                    emit(Progress(fraction, message))

            checkpoint = self._checkpoint(model)
            plan = self._plan(adapter, checkpoint, variant, told, cancel)
            with explained(f"load {variant.notation}"):
                slot, fresh = self._pool.load(
                    checkpoint, variant, max_memory, evict, set(keep), told, cancel, plan
                )
            loaded = describe(slot, fresh)
            return loaded if plan is None else self._fitted(slot, plan, loaded, told)

        return self._stream(work, cancel)

    def _plan(
        self, adapter: Adapter | None, checkpoint: Any, variant: Variant, told=None, cancel=None
    ) -> Any:
        """What will be done with the adapter: found, described, checked against the model. None without one."""
        if adapter is None:
            return None
        from comparator import adapters

        def progress(fraction: float | None, message: str) -> None:
            if cancel is not None and cancel.is_set():
                raise Stopped
            if told:
                told(fraction, message)

        with explained(f"open the adapter {adapter.notation}"):
            return adapters.plan(adapter, checkpoint, variant, progress=progress, settings=self.settings)

    def _fitted(
        self, slot: Slot, plan: Any, loaded: Loaded, told: Callable[[float | None, str], None]
    ) -> Loaded:
        from comparator.adapters import attach, wardrobe

        told(None, f"putting {plan.adapter.notation} on")
        with explained(f"put {plan.adapter.notation} on {slot.variant.notation}"):
            try:
                fitted, fresh = wardrobe.fitted(slot, plan)
            except attach.AltersBase as altered:
                gone = self._pool.unload_altered(slot)
                raise Problem(
                    f"{plan.facts.source} ({plan.facts.kind}) wrote into the shared weights ({altered.args[0]}), so "
                    f"{gone} unloaded.",
                    f"Write {plan.adapter.notation}:merged: that has a base of its own.",
                ) from None
        self._remember()
        return replace(
            loaded,
            kernel=wardrobe.kernel(slot, plan),
            notes=(*loaded.notes, *plan.notes),
            memory=wardrobe.memory(slot, fitted),
            adapter=plan.facts.info(),
            adapter_load_s=fitted.load_s if fitted and fresh else None,
        )

    def generate(
        self,
        handle: str,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        *,
        adapter: Adapter | None = None,
    ) -> Iterator[Chunk | Generation]:
        """Warm up for this prompt's length, then decode; yields a Chunk a token, last the Generation.

        Ids become text on the caller's thread, beside the decoding and not between its steps.
        """
        from comparator.text import TextStream

        def work(emit):
            from comparator.adapters.wardrobe import switch_s
            from comparator.running import run_once

            with explained("generate"):
                slot = self._pool.get(handle)
                with self.wearing(slot, adapter):
                    run = run_once(slot, prompt, settings, cancel, emit, adapter)
                return replace(run, adapter_switch_s=switch_s(slot, adapter))

        text = TextStream(self._call(lambda: self._tokenizer(self._pool.get(handle).checkpoint)))
        with contextlib.closing(self._stream(work, cancel)) as steps:
            for item in steps:
                if not isinstance(item, Generation):
                    token, at = item
                    yield Chunk(text.push(token), (token,), (at,))
                    continue
                rest, whole = text.finish()
                if rest:
                    yield Chunk(rest, (), ())
                yield replace(item, text=whole)

    def score(self, task: Task, cancel: threading.Event) -> Iterator[Progress | Any]:
        """Run a task of `comparator.scoring_tasks`, with progress; the last item is what it gives. Raises `Problem`
        or `Stopped`."""

        def work(emit):
            last = [0.0]

            def told(fraction, message):
                now = time.monotonic()
                if fraction == 1 or now - last[0] > 0.1:
                    last[0] = now
                    emit(Progress(fraction, message))

            with explained("score"):
                return task.run(self, cancel, told)

        return self._stream(work, cancel)

    def work(self, task: Any, cancel: threading.Event) -> Iterator[Any]:
        """Run `task.run(engine, cancel, emit)` on the engine's thread; yields what it emits, last what it gives."""
        return self._stream(lambda emit: task.run(self, cancel, emit), cancel)

    # What a task may use, on the engine's thread.

    def pool(self) -> Any:
        return self._pool

    def slot(self, handle: str) -> Slot:
        return self._pool.get(handle)

    def tokenizer_of(self, model: str) -> Any:
        return self._tokenizer(self._checkpoint(model))

    def tokenizer(self, slot: Slot) -> Any:
        return self._tokenizer(slot.checkpoint)

    @contextlib.contextmanager
    def wearing(self, slot: Slot, adapter: Adapter | None) -> Iterator[Any]:
        """Inside, the slot's model carries the adapter, or none. Not to be nested on one slot."""
        from comparator.adapters import attach, wardrobe

        if adapter is None or adapter.merged:
            yield slot.model
            return
        fitted = wardrobe.known(slot, adapter)
        if fitted is None:  # dropped for others since it was loaded
            fitted, _ = wardrobe.fitted(slot, self._plan(adapter, slot.checkpoint, slot.variant))
        with attach.worn(fitted, adapter.scale):
            yield slot.model

    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        """One row per stored tensor, as it is after the first use; with what carries the adapter marked."""
        from comparator.adapters import wardrobe

        def work():
            slot = self._pool.get(handle)
            return tuple(wardrobe.rows(slot, wardrobe.known(slot, adapter) if adapter else None))

        return self._call(work)


@cache
def get_engine() -> AnyEngine:
    """The engine of this process: its own, or the cluster's where an address is set."""
    if not get_settings().ray_address:
        return Engine()
    from comparator.cluster import ClusterEngine

    return ClusterEngine(get_settings())
