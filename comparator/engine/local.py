"""The engine of this process: load, generate, score, layers, unload, by handle. Models never leave it.

One dedicated thread owns all torch work, loading included: called from changing threads the same decode loop
runs at half speed on a CPU. Importing this module imports no torch; `start()` does that in the background.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comparator.core.errors import UserError
from comparator.core.events import Chunk
from comparator.core.messages import Generation, Loaded, LoadRequest, Prompt
from comparator.core.request import DEFAULT_TEMPLATE, ChatTemplate, GenerationSettings
from comparator.core.result import Environment, ErrorInfo, LayerRow
from comparator.core.settings import Settings, get_settings
from comparator.core.state import EngineState, ModelFacts, Resident
from comparator.core.variant import Adapter, Cell, Variant
from comparator.engine.explain import AFTER_DAMAGE, explained
from comparator.engine.progress import throttled
from comparator.engine.protocol import OnChunk, OnProgress, SinglePlaceEngine, Task, ignore
from comparator.engine.queue import FairQueue
from comparator.engine.worker import Worker, freeze_imports
from comparator.util import error_log
from comparator.util.cuda_errors import DAMAGED
from comparator.util.recent import Recent
from comparator.util.streams import Emit

if TYPE_CHECKING:
    from comparator.runtimes import ResidentModel

_DAMAGED = ErrorInfo("The GPU's context is damaged by an earlier error.", AFTER_DAMAGE)
MODELS_REMEMBERED = 8  # tokenizers and headers, which take up to 100 MB each; those used last


class LocalEngine(SinglePlaceEngine):
    """All work happens on the engine's own thread, one piece after another. Also the `TaskContext` of its tasks."""

    def __init__(
        self,
        settings: Settings | None = None,
        check_source: Callable[[str, str], None] | None = None,
    ):
        """`check_source(name, "model" | "checkpoint" | "adapter")` raises `UserError` for what may not be opened here."""
        self.settings = settings or get_settings()
        self._check_source = check_source or ignore
        self.queue = FairQueue()
        self._worker = Worker()
        self._pool: Any = None
        self._ready = False
        self._device = "cpu"
        self._device_name = ""
        self._residents: tuple[Resident, ...] = ()
        self._tokenizers: Recent[str, Any] = Recent(MODELS_REMEMBERED)
        self._checkpoints: Recent[str, Any] = Recent(MODELS_REMEMBERED)
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
        try:
            self._import_libraries()
        except Exception as error:
            cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            raise UserError(
                f"torch or transformers cannot be imported: {cause}",
                "Install what requirements.txt lists into this Python again, then restart.",
            ) from error

    def _import_libraries(self) -> None:
        from comparator.backends.transformers_loader import import_quietly

        import_quietly()
        import torch
        import transformers

        from comparator.engine.placement import pick_device
        from comparator.engine.pool import Pool
        from comparator.metrics.environment import read

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_grad_enabled(False)
        self._device = pick_device()
        self._device_name = read(self._device).device or self._device
        self._pool = Pool(self.settings, on_change=self._remember)
        freeze_imports()
        self._ready = True

    def _remember(self) -> None:
        """A snapshot of the pool that other threads can read without waiting."""
        self._residents = tuple(resident for resident, _ in self._pool.residents())

    def _call(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the engine's thread and wait for it."""
        self._require_device()
        return self._worker.call(work)

    def _require_device(self) -> None:
        """Raises what kept torch from being imported, and `UserError` once the GPU's context is damaged."""
        self.start().result()
        if DAMAGED.is_set():
            raise UserError(_DAMAGED.problem, _DAMAGED.advice)

    def _follow(
        self, work: Callable[[Emit], Any], callback: Callable[..., None], cancel: threading.Event
    ) -> Any:
        """Run `work(emit)` on the engine's thread and pass what it emits to `callback` on this one."""
        self._require_device()
        return self._worker.follow(work, callback, cancel)

    def _with_progress(
        self, work: Callable[[OnProgress], Any], on_progress: OnProgress, cancel: threading.Event
    ) -> Any:
        """Run `work(on_progress)` on the engine's thread. Reporting progress raises `Stopped` at Stop."""
        return self._follow(lambda emit: work(throttled(emit, cancel)), on_progress, cancel)

    # ------------------------------------------------------------ state

    def state(self) -> EngineState:
        total = free = None
        damaged = DAMAGED.is_set()
        if self._ready and not damaged:
            from comparator.metrics.memory import device_total_and_free

            total, free = device_total_and_free(self._device)
        return EngineState(
            device=self._device_name or "starting …",
            total_bytes=total,
            free_bytes=free,
            budget_bytes=self.settings.budget_bytes,
            waiting=self.queue.waiting,
            busy=self.queue.busy,
            ready=self._ready,
            gpu=self._device.startswith("cuda"),
            residents=self._residents,
            problem=_DAMAGED if damaged else None,
        )

    def facts(self, model: str) -> ModelFacts:
        from comparator.sources import look_up

        self._check_source(model, "model")
        checkpoint = self._checkpoints.get(model)
        return checkpoint.facts() if checkpoint else look_up(model, settings=self.settings)

    def sizes(self, model: str) -> dict[str, int]:
        from comparator.backends import loaded_sizes
        from comparator.sources import on_disk

        self._check_source(model, "model")
        checkpoint = self._checkpoints.get(model) or on_disk(model, self.settings)
        return loaded_sizes(checkpoint) if checkpoint else {}

    def examined(self, model: str) -> str | None:
        from comparator.sources import on_disk
        from comparator.sources.examine import examine

        self._check_source(model, "model")
        if self.queue.busy or (checkpoint := on_disk(model, self.settings)) is None:
            return None
        return self._call(lambda: examine(checkpoint).line)

    def _checkpoint(self, model: str, progress=None, fresh: bool = False) -> Any:
        from comparator.sources import open_checkpoint

        self._check_source(model, "model")
        checkpoint = None if fresh else self._checkpoints.get(model)
        return checkpoint or self._checkpoints.put(
            model, open_checkpoint(model, progress=progress, settings=self.settings)
        )

    def _check(self, named: Variant | Adapter, what: str) -> None:
        if named.source:
            self._check_source(f"{named.source}@{named.revision}" if named.revision else named.source, what)

    def environment(self) -> Environment:
        from comparator.metrics.environment import read

        return self._call(lambda: read(self._device))

    def unload(self, handle: str | None = None) -> int:
        return self._call(lambda: self._unload(handle)) if self._started else 0

    def _unload(self, handle: str | None) -> int:
        if handle is None:
            self._tokenizers.clear()
            self._checkpoints.clear()
        return self._pool.unload(handle)

    # ------------------------------------------------------------ models and prompts

    def open(self, model: str, cancel: threading.Event, on_progress: OnProgress = ignore) -> ModelFacts:
        from comparator.sources.examine import require_complete

        def work(on_progress: OnProgress) -> ModelFacts:
            checkpoint = self._checkpoint(model, on_progress, fresh=True)
            require_complete(checkpoint)
            return checkpoint.facts()

        return self._with_progress(work, on_progress, cancel)

    def complete(
        self, model: str, cell: Cell, cancel: threading.Event, on_progress: OnProgress = ignore
    ) -> Cell:
        from comparator.backends import backend_for, require_full_precision, source_kind

        def work(on_progress: OnProgress) -> Cell:
            self._check(cell.variant, source_kind(cell.variant))
            backend, checkpoint = backend_for(cell.variant), self._checkpoint(model)
            if not cell.variant.source:
                require_full_precision(checkpoint)
            with explained(f"look at {cell.variant.notation}"):
                variant = backend.complete(cell.variant, checkpoint, on_progress)
                return replace(cell, variant=variant)

        return self._with_progress(work, on_progress, cancel)

    def encode(
        self,
        model: str,
        prompt: str,
        system: str | None,
        chat: bool | None,
        template: ChatTemplate = DEFAULT_TEMPLATE,
        history: tuple[tuple[str, str], ...] = (),
    ) -> Prompt:
        from comparator.decoding.text import encode

        def work():
            texts = (prompt, system, *(text for _, text in history))
            with error_log.hidden(*texts), explained("encode the prompt"):
                tokenizer = self._tokenizer(self._checkpoint(model))
                return encode(tokenizer, prompt, system, chat, template, history)

        return self._call(work)

    def needed_bytes(self, model: str, variant: Variant) -> int:
        """About how much memory the variant will take on its device. Raises `UserError`."""
        from comparator.backends import backend_for
        from comparator.engine.placement import pick_device

        backend = backend_for(variant)
        return self._call(lambda: backend.needed_bytes(variant, self._checkpoint(model), pick_device()))

    def _tokenizer(self, checkpoint: Any) -> Any:
        from comparator.sources.tokenizer import load_tokenizer

        key = str(checkpoint.path)
        known = self._tokenizers.get(key)  # one may be false: it has a length
        return self._tokenizers.put(key, load_tokenizer(checkpoint)) if known is None else known

    # ------------------------------------------------------------ resident variants

    def load(self, request: LoadRequest, cancel: threading.Event, on_progress: OnProgress = ignore) -> Loaded:
        def work(on_progress: OnProgress) -> Loaded:
            from comparator.backends import source_kind
            from comparator.runtimes import runtime_for

            variant, adapter = request.variant, request.adapter
            self._check(variant, source_kind(variant))
            checkpoint = self._checkpoint(request.model)
            if adapter is not None:
                runtime_for(variant).require("adapters", variant)
            plan = self._plan(adapter, checkpoint, variant, on_progress)
            with explained(f"load {variant.notation}"):
                slot, fresh = self._pool.load(
                    checkpoint, variant, request.max_memory, request.evict, set(request.keep), on_progress, cancel,
                    plan,
                )  # fmt: skip
            if plan is None:
                return slot.describe(fresh)
            on_progress(None, f"attaching {plan.adapter.notation}")
            seconds = self._attach(slot, plan)
            self._remember()
            return replace(slot.describe(fresh, plan), adapter_load_s=seconds)

        return self._with_progress(work, on_progress, cancel)

    def _plan(
        self, adapter: Adapter | None, checkpoint: Any, variant: Variant, on_progress: OnProgress = ignore
    ) -> Any:
        """How the adapter will be applied: located, described, checked against the model. None without one."""
        if adapter is None:
            return None
        self._check(adapter, "adapter")
        from comparator import adapters

        with explained(f"open the adapter {adapter.notation}"):
            return adapters.plan(adapter, checkpoint, variant, progress=on_progress, settings=self.settings)

    def _attach(self, slot: ResidentModel, plan: Any) -> float | None:
        """`slot.attach`; where the adapter wrote into shared weights, whatever has them is unloaded."""
        from comparator.adapters.attach import AltersBase

        with explained(f"attach {plan.adapter.notation} to {slot.variant.notation}"):
            try:
                return slot.attach(plan)
            except AltersBase as altered:
                gone = self._pool.unload_altered(slot)
                raise UserError(
                    f"{plan.facts.source} ({plan.facts.kind}) wrote into the shared weights ({altered.args[0]}), so "
                    f"{gone} unloaded.",
                    f"Use {plan.adapter.notation}:merged, which has its own base.",
                ) from None

    def generate(
        self,
        handle: str,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        on_chunk: OnChunk = ignore,
        *,
        adapter: Adapter | None = None,
    ) -> Generation:
        from comparator.decoding.text import TextStream, thinking

        def work(emit: Emit) -> Generation:
            with explained("generate"):
                slot = self._with_adapter(handle, adapter)
                return slot.generate(prompt, settings, cancel, emit, adapter)

        text = TextStream(self._call(lambda: self._tokenizer(self._pool.get(handle).checkpoint)))

        def on_token(step: tuple[int, float]) -> None:
            """On the caller's thread: between two steps it would cost time."""
            token, at_s = step
            on_chunk(Chunk(text.push(token), (token,), (at_s,)))

        run = self._follow(work, on_token, cancel)
        rest, whole = text.finish()
        if rest:
            on_chunk(Chunk(rest, (), ()))
        whole = run.text or whole
        return replace(
            run, text=whole, thinking=thinking(text.tokenizer, run.token_ids, whole, prompt.opened)
        )

    def score(self, task: Task, cancel: threading.Event, on_progress: OnProgress = ignore) -> Any:
        def work(on_progress: OnProgress) -> Any:
            with explained("score"):
                return task.run(self, cancel, on_progress)

        return self._with_progress(work, on_progress, cancel)

    def training_refusal(self) -> str | None:
        return None

    def work(self, task: Any, cancel: threading.Event, emit: Callable[[Any], None]) -> Any:
        return self._follow(lambda queued: task.run(self, cancel, queued), emit, cancel)

    # ------------------------------------------------------------ for tasks, on the engine's thread

    def pool(self) -> Any:
        return self._pool

    def slot(self, handle: str) -> ResidentModel:
        return self._pool.get(handle)

    def tokenizer_of(self, model: str) -> Any:
        return self._tokenizer(self._checkpoint(model))

    def tokenizer(self, slot: ResidentModel) -> Any:
        return self._tokenizer(slot.checkpoint)

    @contextlib.contextmanager
    def column(self, handle: str, adapter: Adapter | None = None) -> Iterator[ResidentModel]:
        slot = self._with_adapter(handle, adapter)
        with slot.using(adapter):
            yield slot

    def _with_adapter(self, handle: str, adapter: Adapter | None) -> ResidentModel:
        """The resident variant, with the adapter attached again where it was dropped for others since it was loaded."""
        slot = self._pool.get(handle)
        if not slot.has(adapter):
            self._attach(slot, self._plan(adapter, slot.checkpoint, slot.variant))
        return slot

    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        return self._call(lambda: self._pool.get(handle).layers(adapter))
