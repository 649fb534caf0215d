"""The `Engine` for models on a Ray cluster. Imports neither Ray nor torch.

Every method forwards its arguments to the driver's process (driver_client.py) with the scheduler (scheduler.py). After
that process has ended, because the cluster's head was lost, the next request starts another one.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparator.cluster.driver_client import DriverConnection, Gone
from comparator.cluster.errors import driver_gone, unreachable
from comparator.cluster.rpc import Call
from comparator.core.errors import UserError
from comparator.core.messages import Generation, Loaded, LoadRequest, Prompt
from comparator.core.request import DEFAULT_TEMPLATE, ChatTemplate, GenerationSettings
from comparator.core.result import Environment, ErrorInfo, LayerRow
from comparator.core.settings import Settings
from comparator.core.state import EngineState, ModelFacts
from comparator.core.variant import Adapter, Cell
from comparator.deploy.limits import limits_of
from comparator.engine.protocol import Engine, OnChunk, OnProgress, Task, ignore
from comparator.engine.queue import FairQueue
from comparator.util.streams import in_thread

REFRESH_S = 4.0  # how old the page's view of the nodes may be
DOING = {"open": "opening the model", "load": "loading", "generate": "generating", "score": "scoring"}


class ClusterEngine(Engine):
    """Variants on the machines of the Ray cluster at `settings.ray_address`."""

    has_several_devices = True

    def __init__(self, settings: Settings):
        self.settings = settings
        self._limits = limits_of(settings)
        self.queue = FairQueue()
        self._connection: DriverConnection | None = None
        self._starting = threading.Lock()
        self._state = EngineState("Ray cluster", None, None, settings.budget_bytes)
        self._updated_s = self._refreshing_s = 0.0

    # ------------------------------------------------------------ the driver

    def start(self) -> Future:
        """Connect in the background. Returns at once; an error is in `state()`, and raised by the next call."""
        return in_thread(self._connected, "connecting")

    def _connected(self) -> DriverConnection:
        """The connection to a driver that has reached the cluster. Raises `UserError`."""
        with self._starting:
            if self._connection is not None and self._connection.alive:
                return self._connection
            connection = DriverConnection(self.settings, self._remember)
            try:
                connection.call(Call("start"))
            except (UserError, Gone) as error:
                connection.close()
                address = str(self.settings.ray_address)
                problem = error if isinstance(error, UserError) else unreachable(address, "no response")
                self._state = replace(self._state, problem=ErrorInfo(problem.problem, problem.advice))
                raise problem from None
            self._connection = connection
            return connection

    def _remember(self, state: EngineState) -> None:
        self._state, self._updated_s = state, time.monotonic()

    def _lost(self, doing: str) -> UserError:
        problem = driver_gone(str(self.settings.ray_address), doing)
        self._state = replace(
            self._state,
            residents=(),
            nodes=(),
            ready=False,
            problem=ErrorInfo(problem.problem, problem.advice),
        )
        return problem

    def _call(
        self,
        name: str,
        *arguments: Any,
        cancel: threading.Event | None = None,
        callback: tuple[str, Callable[..., None]] | None = None,
        **keywords: Any,
    ) -> Any:
        """Call a method of the scheduler. `callback`: the name of its parameter, and the function."""
        parameter, function = callback or (None, ignore)
        call = Call(name, arguments, keywords, cancel is not None, parameter)
        try:
            return self._connected().call(call, cancel, function)
        except Gone:
            raise self._lost(DOING.get(name, name)) from None

    def close(self) -> None:
        """Disconnect from the cluster: every actor ends."""
        with self._starting:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
                self._state = EngineState("Ray cluster", None, None, self.settings.budget_bytes)

    # ------------------------------------------------------------ state

    def state(self) -> EngineState:
        """The last known state, returned at once; it is updated in the background, at most every REFRESH_S seconds."""
        now = time.monotonic()
        if self._connected_now() and now - max(self._updated_s, self._refreshing_s) > REFRESH_S:
            self._refreshing_s = now
            in_thread(lambda: self._call("refresh"), "refresh")  # `state()` holds what went wrong
        return replace(self._state, waiting=self.queue.waiting, busy=self.queue.busy)

    def _connected_now(self) -> bool:
        return self._connection is not None and self._connection.alive

    def facts(self, model: str) -> ModelFacts:
        from comparator.sources import look_up

        self._limits.check_source(model)
        return look_up(model, settings=self.settings)

    def environment(self) -> Environment:
        return self._call("environment")

    def unload(self, handle: str | None = None) -> int:
        return self._call("unload", handle) if self._connected_now() else 0

    def release_scores(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if self._connected_now():
            with contextlib.suppress(
                UserError
            ):  # files of an actor that is gone are deleted by the next one there
                self._call("release_scores", folder)

    # ------------------------------------------------------------ placement

    def compares_weights(self, *handles: str | None) -> bool:
        return self.resident(*handles)  # from actor to actor, a layer at a time

    def together(self, *handles: str | None) -> bool:
        return self._call("together", *handles)

    def lane(self, handle: str) -> str | None:
        return self._call("lane", handle)

    # ------------------------------------------------------------ models and prompts

    def open(self, model: str, cancel: threading.Event, on_progress: OnProgress = ignore) -> ModelFacts:
        self._limits.check_source(model)
        return self._call("open", model, cancel=cancel, callback=("on_progress", on_progress))

    def complete(
        self, model: str, cell: Cell, cancel: threading.Event, on_progress: OnProgress = ignore
    ) -> Cell:
        self._limits.check_cell(cell)
        return self._call("complete", model, cell, cancel=cancel, callback=("on_progress", on_progress))

    def encode(
        self,
        model: str,
        prompt: str,
        system: str | None,
        chat: bool | None,
        template: ChatTemplate = DEFAULT_TEMPLATE,
        history: tuple[tuple[str, str], ...] = (),
    ) -> Prompt:
        return self._call("encode", model, prompt, system, chat, template, history)

    # ------------------------------------------------------------ resident variants

    def load(self, request: LoadRequest, cancel: threading.Event, on_progress: OnProgress = ignore) -> Loaded:
        self._limits.check_source(request.model)
        self._limits.check_cell(Cell(request.variant, request.adapter))
        return self._call("load", request, cancel=cancel, callback=("on_progress", on_progress))

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
        return self._call(
            "generate", handle, prompt, settings, cancel=cancel, callback=("on_chunk", on_chunk), adapter=adapter
        )  # fmt: skip

    def score(self, task: Task, cancel: threading.Event, on_progress: OnProgress = ignore) -> Any:
        return self._call("score", task, cancel=cancel, callback=("on_progress", on_progress))

    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        return self._call("layers", handle, adapter)

    # ------------------------------------------------------------ training

    def training_refusal(self) -> str | None:
        return "Training runs on one machine, and this installation computes on a Ray cluster."

    def work(self, task: Any, cancel: threading.Event, emit: Callable[[Any], None]) -> Any:
        raise UserError(self.training_refusal(), "Unset COMPARATOR_RAY_ADDRESS to train on this machine.")
