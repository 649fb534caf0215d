"""An engine without torch: models in memory that answer with fixed tokens. What a new `Engine` needs at the least."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.core.events import Chunk
from comparator.core.messages import Generation, Loaded, LoadRequest, Prompt
from comparator.core.request import DEFAULT_TEMPLATE, ChatTemplate, GenerationSettings
from comparator.core.result import Environment, Latency, LayerRow, Memory, ModelInfo
from comparator.core.settings import Settings
from comparator.core.state import EngineState, ModelFacts, Resident
from comparator.core.variant import Adapter, Cell
from comparator.engine.protocol import Engine, OnChunk, OnProgress, Task, ignore
from comparator.engine.queue import FairQueue

WORDS = ("It", " is", " Paris", ".")
REFUSAL = "A toy has no weights to train."


class ToyEngine(Engine):
    """Every variant answers WORDS, each on a device of its own. `failing`: the notation of one that cannot be loaded."""

    has_several_devices = True

    def __init__(self, settings: Settings, failing: str = ""):
        self.settings, self.queue, self.failing = settings, FairQueue(), failing
        self.requests: dict[str, LoadRequest] = {}

    def start(self) -> Future:
        future: Future = Future()
        future.set_result(None)
        return future

    def state(self) -> EngineState:
        residents = tuple(
            Resident(handle, request.model, request.variant.notation, 1000, handle)
            for handle, request in self.requests.items()
        )
        return EngineState("toy", None, None, ready=True, busy=self.queue.busy, residents=residents)

    def environment(self) -> Environment:
        return Environment(device="toy")

    def facts(self, model: str) -> ModelFacts:
        return ModelFacts(model, context_length=128)

    def open(self, model: str, cancel: threading.Event, on_progress: OnProgress = ignore) -> ModelFacts:
        on_progress(0.5, "opening the toy")
        return self.facts(model)

    def complete(
        self, model: str, cell: Cell, cancel: threading.Event, on_progress: OnProgress = ignore
    ) -> Cell:
        return cell

    def encode(
        self,
        model: str,
        prompt: str,
        system: str | None,
        chat: bool | None,
        template: ChatTemplate = DEFAULT_TEMPLATE,
        history: tuple[tuple[str, str], ...] = (),
    ) -> Prompt:
        words = [word for text in (*(text for _, text in history), prompt) for word in text.split()]
        return Prompt(tuple(range(len(words))), bool(chat))

    def load(self, request: LoadRequest, cancel: threading.Event, on_progress: OnProgress = ignore) -> Loaded:
        notation = request.variant.notation
        if notation == self.failing:
            raise UserError(f"{notation} does not load.", "It never does.")
        on_progress(1.0, "loading the toy")
        self.requests[notation] = request
        memory = Memory(weight_bytes=1000, resident_bytes=1000)
        return Loaded(notation, request.variant, ModelInfo(request.model), "toy kernel", (), memory, 0.5, 0.1)

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
        done = 0
        for token, word in enumerate(WORDS[: settings.max_new_tokens]):
            if cancel.is_set():
                break
            on_chunk(Chunk(word, (token,), (0.1 * token,)))
            done += 1
        return Generation(
            text="".join(WORDS[:done]),
            token_ids=tuple(range(done)),
            finish_reason="stopped" if cancel.is_set() else "eos",
            latency=Latency(decode_tok_s=10.0),
            prepare_s=None,
            run_peak_bytes=2000,
            kv_cache_bytes=None,
            decode_path="toy",
        )

    def score(self, task: Task, cancel: threading.Event, on_progress: OnProgress = ignore) -> Any:
        if cancel.is_set():
            raise Stopped
        raise UserError("A toy has no logits.", "Leave fidelity out.")

    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        return ()

    def unload(self, handle: str | None = None) -> int:
        handles = list(self.requests) if handle is None else [handle]
        return sum(1000 for h in handles if self.requests.pop(h, None))

    def release_scores(self, folder: Path) -> None:
        pass

    def lane(self, handle: str) -> str | None:
        return handle if handle in self.requests else None

    def together(self, *handles: str | None) -> bool:
        return len(set(handles)) == 1

    def compares_weights(self, *handles: str | None) -> bool:
        return False

    def training_refusal(self) -> str | None:
        return REFUSAL

    def work(self, task: Any, cancel: threading.Event, emit: Callable[[Any], None]) -> Any:
        raise UserError(REFUSAL)
