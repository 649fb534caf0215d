"""The seam under a comparison: what it asks of an engine, wherever the models live. Imports nothing heavy.

`comparator.engine.Engine` holds them in this process, `comparator.cluster.ClusterEngine` on the machines of a Ray
cluster. What is above (compare, judge, sensitivity, page, command line) does not know which it talks to: what goes in
and comes out are plain dataclasses that pickle.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from comparator.types import (
    Adapter,
    Cell,
    Chunk,
    EngineState,
    Environment,
    GenerationSettings,
    LayerRow,
    ModelFacts,
    Variant,
)

if TYPE_CHECKING:
    from comparator.messages import Generation, Loaded, Progress, Prompt
    from comparator.scoring_tasks import Task
    from comparator.settings import Settings
    from comparator.turns import Turns


class AnyEngine(Protocol):
    """Every method is safe from any thread and raises `Problem` for what a person can mend; iterators raise `Stopped`
    at Stop, and closing one stops what it stands for. `comparator.engine.Engine` describes each."""

    settings: Settings
    turns: Turns

    def start(self) -> Any: ...
    def state(self) -> EngineState: ...
    def facts(
        self, model: str, progress: Callable[[float | None, str], None] | None = None
    ) -> ModelFacts: ...
    def environment(self) -> Environment: ...
    def unload(self, handle: str | None = None) -> int: ...
    def handle_of(self, model: str, variant: str) -> str | None: ...
    def open(self, model: str, cancel: threading.Event) -> Iterator[Progress | ModelFacts]: ...
    def complete(self, model: str, cell: Cell, cancel: threading.Event) -> Iterator[Progress | Cell]: ...
    def encode(self, model: str, prompt: str, system: str | None, chat: bool | None) -> Prompt: ...
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
        """An engine that has several devices also takes `apart`: on one of its own, where one is free."""
        ...

    def generate(
        self,
        handle: str,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        *,
        adapter: Adapter | None = None,
    ) -> Iterator[Chunk | Generation]: ...
    def score(self, task: Task, cancel: threading.Event) -> Iterator[Progress | Any]: ...
    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]: ...

    def lane(self, handle: str) -> str | None:
        """What a resident variant runs on; columns of different lanes may run at the same time. None: not resident."""
        ...

    def resident(self, *handles: str | None) -> bool:
        """Whether all of them are loaded."""
        ...

    def together(self, *handles: str | None) -> bool:
        """Whether all of them are loaded in one place, so that one piece of work can use their models at once."""
        ...

    def compares_weights(self, *handles: str | None) -> bool:
        """Whether the weights of the two can be compared where they are now."""
        ...

    def release_scores(self, folder: Path) -> None:
        """Remove what `Keep…` tasks wrote under this folder's name, wherever that was."""
        ...


class Seen:
    """What can be read off `state()`, whatever the engine."""

    def state(self) -> EngineState:
        raise NotImplementedError

    def handle_of(self, model: str, variant: str) -> str | None:
        """The handle of a resident variant, by names."""
        held = self.state().residents
        return next((r.handle for r in held if (r.model, r.variant) == (model, variant)), None)

    def resident(self, *handles: str | None) -> bool:
        return set(handles) <= {r.handle for r in self.state().residents}


class InOnePlace(Seen):
    """How an engine answers whose models all live in its own process, on one thread."""

    def lane(self, handle: str) -> str | None:
        return "here" if self.resident(handle) else None

    def together(self, *handles: str | None) -> bool:
        return self.resident(*handles)

    def compares_weights(self, *handles: str | None) -> bool:
        return self.resident(*handles)

    def release_scores(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
