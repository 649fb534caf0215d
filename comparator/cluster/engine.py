"""The engine that the rest of the program sees when the models live on a Ray cluster. Imports neither Ray nor torch.

Every method passes its arguments to the driver's process (pipe.py), which knows the cluster (conductor.py). When that
process has ended, because the head is gone, the next request starts another one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparator.cluster.failures import driver_gone, unreachable
from comparator.cluster.pipe import Gone, Line
from comparator.messages import Generation, Loaded, Progress, Prompt
from comparator.seam import Seen
from comparator.settings import Settings
from comparator.turns import Turns
from comparator.types import (
    Adapter,
    Cell,
    Chunk,
    EngineState,
    Environment,
    ErrorInfo,
    GenerationSettings,
    LayerRow,
    ModelFacts,
    Problem,
    Variant,
)

REFRESH_S = 4.0  # how old what the page shows of the nodes may be
DOING = {"open": "opening the model", "load": "loading", "generate": "generating", "score": "scoring"}


class ClusterEngine(Seen):
    """As `comparator.engine.Engine`, whose methods say what each does."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.turns = Turns()
        self._line: Line | None = None
        self._starting = threading.Lock()
        self._state = EngineState("Ray cluster", None, None, settings.budget_bytes)
        self._seen = self._looking = 0.0

    # ------------------------------------------------------------ the driver

    def start(self) -> Future:
        """Connect in the background. Returns at once; what goes wrong is in `state()`, and told to who asks next."""
        future: Future = Future()

        def work() -> None:
            try:
                self._connected()
                future.set_result(None)
            except Problem as problem:
                future.set_exception(problem)

        threading.Thread(target=work, name="connecting", daemon=True).start()
        return future

    def _connected(self) -> Line:
        """The line to a driver that has reached the cluster. Raises `Problem`."""
        with self._starting:
            if self._line is not None and self._line.alive:
                return self._line
            line = Line(self.settings, self._remember)
            try:
                list(line.stream("start"))
            except (Problem, Gone) as error:
                line.close()
                address = str(self.settings.ray_address)
                problem = (
                    error if isinstance(error, Problem) else unreachable(address, "nothing answers there")
                )
                self._state = replace(self._state, problem=ErrorInfo(problem.problem, problem.advice))
                raise problem from None
            self._line = line
            return line

    def _remember(self, state: EngineState) -> None:
        self._state, self._seen = state, time.monotonic()

    def _gone(self, gone: Gone, doing: str) -> Problem:
        problem = driver_gone(str(self.settings.ray_address), doing)
        self._state = replace(
            self._state,
            residents=(),
            nodes=(),
            ready=False,
            problem=ErrorInfo(problem.problem, problem.advice),
        )
        return problem

    def _ask(
        self, name: str, *arguments: Any, cancel: threading.Event | None = None, **named: Any
    ) -> Iterator:
        try:
            yield from self._connected().stream(name, *arguments, cancel=cancel, **named)
        except Gone as gone:
            raise self._gone(gone, DOING.get(name, name)) from None

    def _one(self, name: str, *arguments: Any) -> Any:
        (found,) = self._ask(name, *arguments)
        return found

    def close(self) -> None:
        """Let go of the cluster: every actor ends."""
        with self._starting:
            if self._line is not None:
                self._line.close()
                self._line = None
                self._state = EngineState("Ray cluster", None, None, self.settings.budget_bytes)

    # ------------------------------------------------------------ what is there

    def state(self) -> EngineState:
        """Returns at once; the nodes are looked at in the background, at most every few seconds."""
        now = time.monotonic()
        if self._line is not None and self._line.alive and now - max(self._seen, self._looking) > REFRESH_S:
            self._looking = now
            threading.Thread(target=self._look, name="looking", daemon=True).start()
        return replace(self._state, waiting=self.turns.waiting, busy=self.turns.busy)

    def _look(self) -> None:
        try:
            self._one("refresh")
        except Problem:
            pass  # `state()` says it

    def facts(self, model: str, progress: Callable[[float | None, str], None] | None = None) -> ModelFacts:
        from comparator.sources import look_up

        return look_up(model, settings=self.settings)

    def environment(self) -> Environment:
        return self._one("environment")

    def compares_weights(self, *handles: str | None) -> bool:
        return self.resident(*handles)  # from actor to actor, a layer at a time

    def together(self, *handles: str | None) -> bool:
        return self._one("together", *handles)

    def lane(self, handle: str) -> str | None:
        return self._one("lane", handle)

    def unload(self, handle: str | None = None) -> int:
        return self._one("unload", handle) if self._line is not None and self._line.alive else 0

    def release_scores(self, folder: Path) -> None:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        if self._line is not None and self._line.alive:
            try:
                self._one("release_scores", folder.name)
            except Problem:
                pass  # with the actors their scores are left to the next one's tidying

    # ------------------------------------------------------------ a comparison's steps

    def open(self, model: str, cancel: threading.Event) -> Iterator[Progress | ModelFacts]:
        return self._ask("open", model, cancel=cancel)

    def complete(self, model: str, cell: Cell, cancel: threading.Event) -> Iterator[Progress | Cell]:
        return self._ask("complete", model, cell, cancel=cancel)

    def encode(self, model: str, prompt: str, system: str | None, chat: bool | None) -> Prompt:
        return self._one("encode", model, prompt, system, chat)

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
        apart: bool = False,
    ) -> Iterator[Progress | Loaded]:
        """`apart`: on a device of its own, where one is free."""
        return self._ask(
            "load", model, variant, cancel=cancel, max_memory=max_memory, evict=evict, keep=keep, adapter=adapter,
            apart=apart,
        )  # fmt: skip

    def generate(
        self,
        handle: str,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        *,
        adapter: Adapter | None = None,
    ) -> Iterator[Chunk | Generation]:
        return self._ask("generate", handle, prompt, settings, cancel=cancel, adapter=adapter)

    def score(self, task: Any, cancel: threading.Event) -> Iterator[Progress | Any]:
        return self._ask("score", task, cancel=cancel)

    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        return self._one("layers", handle, adapter)
