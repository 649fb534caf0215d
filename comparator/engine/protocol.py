"""The contract between what compares models and where they live. Imports nothing heavy.

`comparator.engine.local.LocalEngine` holds models in this process, `comparator.cluster.ClusterEngine` on the machines of
a Ray cluster.
"""

from __future__ import annotations

import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from comparator.core.events import Chunk
from comparator.core.messages import Generation, Loaded, LoadRequest, Prompt
from comparator.core.request import DEFAULT_TEMPLATE, ChatTemplate, GenerationSettings
from comparator.core.result import Environment, LayerRow
from comparator.core.settings import Settings
from comparator.core.state import EngineState, ModelFacts
from comparator.core.variant import Adapter, Cell
from comparator.engine.queue import FairQueue

if TYPE_CHECKING:
    from comparator.runtimes import ResidentModel


OnProgress = Callable[[float | None, str], None]  # fraction 0..1 or None, and what is being done
OnChunk = Callable[[Chunk], None]


def ignore(*_: Any) -> None:
    """A callback that does nothing."""


class TaskContext(Protocol):
    """What a task may use of the engine that runs it."""

    def slot(self, handle: str) -> ResidentModel: ...
    def tokenizer(self, slot: ResidentModel) -> Any: ...
    def tokenizer_of(self, model: str) -> Any: ...
    def column(self, handle: str, adapter: Adapter | None = None) -> AbstractContextManager[ResidentModel]:
        """The resident variant, with the adapter switched on inside, or none. Not to be nested on one handle."""
        ...


class Task(ABC):
    """A piece of work on resident models: a frozen dataclass of plain data, so that it pickles."""

    @property
    def runs_on(self) -> str | None:
        """The handle of the resident variant that it works on, which decides where it runs. None: it needs none."""
        return getattr(self, "handle", None)

    @abstractmethod
    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> Any:
        """Called on the engine's thread. The result has to pickle. Raises `UserError`, or `Stopped` at Stop."""


class Engine(ABC):
    """Where models live. A subclass implements every abstract method; nothing above it knows which one it talks to.

    Models never leave an engine: what goes in and comes out are plain dataclasses that pickle, and a resident variant is
    named by its handle. All methods may be called from any thread and raise `UserError` for what a person can put right.

    Methods that take `cancel` block until their work has ended. They raise `Stopped` soon after `cancel` is set, except
    `generate`, which returns what it has. Callbacks are called on the calling thread, so a slow one delays nothing but
    itself; if one raises, the work is stopped, and the error is raised once the device is free.

    Whoever uses the device for more than one call does so inside `with engine.queue.turn(cancel, …)`.

    Subclasses set `settings` and `queue` when they are created.
    """

    settings: Settings
    queue: FairQueue

    # ------------------------------------------------------------ state

    @abstractmethod
    def start(self) -> Future:
        """Prepare in the background (imports, a connection). Returns at once; every other method starts it too."""

    @abstractmethod
    def state(self) -> EngineState:
        """Devices, resident variants, the queue. Returns at once, also while the device is busy."""

    @abstractmethod
    def environment(self) -> Environment:
        """Device, driver and library versions that results are recorded with."""

    @abstractmethod
    def facts(self, model: str) -> ModelFacts:
        """What is known of a model before loading; downloads no weights and needs no torch."""

    def examined(self, model: str) -> str | None:
        """A line about the model's files: complete, or what is wrong. None where they are not on this machine, and
        while a comparison runs."""
        return None

    def sizes(self, model: str) -> dict[str, int]:
        """Bytes that each preset would hold once loaded, by notation, from the headers of files on this machine. Empty where they
        are not here."""
        return {}

    # ------------------------------------------------------------ models and prompts

    @abstractmethod
    def open(self, model: str, cancel: threading.Event, on_progress: OnProgress = ignore) -> ModelFacts:
        """Find, download or convert the model, so that it can be loaded."""

    @abstractmethod
    def complete(
        self, model: str, cell: Cell, cancel: threading.Event, on_progress: OnProgress = ignore
    ) -> Cell:
        """The cell with what only the model determines filled in (a group size, say). May download a ready-made
        checkpoint."""

    @abstractmethod
    def encode(
        self,
        model: str,
        prompt: str,
        system: str | None,
        chat: bool | None,
        template: ChatTemplate = DEFAULT_TEMPLATE,
        history: tuple[tuple[str, str], ...] = (),
    ) -> Prompt:
        """The prompt's token ids. `chat`: use the chat template; None: where the model has one. `template`: which one,
        and its variables. `history`: (role, content) of the turns between the system prompt and this one."""

    # ------------------------------------------------------------ resident variants

    @abstractmethod
    def load(self, request: LoadRequest, cancel: threading.Event, on_progress: OnProgress = ignore) -> Loaded:
        """Make a variant resident, fitted with its adapter, which is checked before anything is loaded."""

    @abstractmethod
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
        """Warm up for this prompt's length, then decode, measured; `on_chunk` gets the text as it comes."""

    @abstractmethod
    def score(self, task: Task, cancel: threading.Event, on_progress: OnProgress = ignore) -> Any:
        """Run a task where its models are; returns its result."""

    @abstractmethod
    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        """One row per stored tensor, as stored after the first use, with the adapter's rank where it applies."""

    @abstractmethod
    def unload(self, handle: str | None = None) -> int:
        """Unload one variant, or all. Returns the bytes that were freed."""

    @abstractmethod
    def release_scores(self, folder: Path) -> None:
        """Delete the logits that tasks stored under this folder's name, wherever that was."""

    # ------------------------------------------------------------ placement

    @property
    @abstractmethod
    def has_several_devices(self) -> bool:
        """Whether columns of different devices may run at the same time here."""

    @abstractmethod
    def lane(self, handle: str) -> str | None:
        """The device or devices that a resident variant runs on; columns of different lanes may run at the same time.
        None: not resident."""

    @abstractmethod
    def together(self, *handles: str | None) -> bool:
        """Whether all of them are resident in one place, so that one task can use their models at once."""

    @abstractmethod
    def compares_weights(self, *handles: str | None) -> bool:
        """Whether the weights of these variants can be compared where they are now."""

    # ------------------------------------------------------------ training

    @abstractmethod
    def training_refusal(self) -> str | None:
        """Why this engine cannot train, as a sentence; None where it can."""

    @abstractmethod
    def work(self, task: Any, cancel: threading.Event, emit: Callable[[Any], None]) -> Any:
        """Run `task.run(engine, cancel, emit)` with the whole engine at its disposal; returns its result. Raises
        `UserError` where `training_refusal()` gives a reason."""

    # ------------------------------------------------------------ read off `state()`

    def handle_of(self, model: str, variant: str) -> str | None:
        """The handle of a resident variant, by names."""
        residents = self.state().residents
        return next((r.handle for r in residents if (r.model, r.variant) == (model, variant)), None)

    def resident(self, *handles: str | None) -> bool:
        """Whether all of them are loaded."""
        return set(handles) <= {r.handle for r in self.state().residents}


class SinglePlaceEngine(Engine):
    """An engine whose models all live in one process and run one after another."""

    has_several_devices = False

    def lane(self, handle: str) -> str | None:
        return "here" if self.resident(handle) else None

    def together(self, *handles: str | None) -> bool:
        return self.resident(*handles)

    def compares_weights(self, *handles: str | None) -> bool:
        return self.resident(*handles)

    def release_scores(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
