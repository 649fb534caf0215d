"""The Ray actor in which one resident variant lives: an ordinary local engine, and what Ray needs to reach it.

Runs on a node. Times, peaks, energy and the environment are taken here, on this machine's clock. Imports Ray only inside
functions; Ray makes an actor of `Holder` when the driver asks for one.
"""

from __future__ import annotations

import os
import pickle
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparator.cluster.far import Beside, ModuleNames, ModuleTensors, Packed
from comparator.hosting import Host
from comparator.types import Environment, ModelFacts, Resident, Variant

INTERVAL_S = 0.004  # tokens travel in batches: Ray's work for one would stand between two of them


@dataclass(frozen=True)
class Facts:
    """Who an actor is. `device_ids`: Ray's ids of its GPUs; empty: it uses the CPU."""

    node: str
    pid: int
    device_ids: tuple[str, ...]


class Holder:
    """One resident variant, or the clerk that reads models and prompts. `cores` {node's id: CPUs that Ray lends
    there}: how many threads torch may use."""

    def __init__(self, cores: dict[str, float]):
        import ray

        context = ray.get_runtime_context()
        self._ids = tuple(str(i) for i in context.get_accelerator_ids().get("GPU", ()))
        self._node = context.get_node_id()
        if not self._ids:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not asked for is somebody else's
        lent = max(1, int(cores.get(self._node, 0)) or os.cpu_count() or 1)
        self._threads = min(lent, os.cpu_count() or 1)
        os.environ["OMP_NUM_THREADS"] = str(self._threads)  # before torch is imported; Ray's own default is 1
        from comparator.engine import Engine
        from comparator.settings import Settings

        # The node's own settings (cache folder, tokens); the budget is kept where all of a node's actors are known.
        settings = Settings().model_copy(update={"memory_budget": None, "ray_address": None})
        self.engine = _Here(settings, Engine, self._threads)
        self.host = Host(self.engine, INTERVAL_S)
        self._pulled: dict[str, Iterator[bytes]] = {}
        self.engine.engine.start()  # torch loads while the driver is told that the actor is there

    def facts(self) -> Facts:
        return Facts(self._node, os.getpid(), self._ids)

    # ------------------------------------------------------------ work, by ticket

    def stream(
        self, ticket: str, name: str, arguments: tuple, named: dict, stoppable: bool
    ) -> Iterator[bytes]:
        """A Ray generator of batches (comparator/hosting.py). Pickled here: bytes are what Ray passes on without
        looking into them, and its own pickling would hold Python's lock while the next token is computed."""
        for batch in self.host.serve(ticket, name, arguments, named, stoppable):
            yield pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)

    def pull(self, ticket: str, name: str, arguments: tuple, named: dict, stoppable: bool) -> bytes | None:
        """The next batch, None after the last: for Ray Client (ray://…), which has no generators."""
        if ticket not in self._pulled:
            self._pulled[ticket] = self.stream(ticket, name, arguments, named, stoppable)
        batch = next(self._pulled[ticket], None)
        if batch is None:
            del self._pulled[ticket]
        return batch

    def stop(self, ticket: str) -> None:
        self.host.stop(ticket)

    def residents(self) -> tuple[Resident, ...]:
        return self.engine.engine.state().residents

    # ------------------------------------------------------------ for other actors

    def rows(self, kept: Any, start: int, end: int) -> Packed:
        """Scores that this actor wrote. Read beside whatever else it does."""
        return Packed.of(kept.rows(start, end))

    def module_names(self, handle: str) -> tuple[str, ...]:
        return self._one(ModuleNames(handle))

    def module_tensors(self, handle: str, name: str) -> dict[str, Packed]:
        return self._one(ModuleTensors(handle, name))

    def _one(self, task: Any) -> Any:
        *_, result = self.engine.engine.score(task, threading.Event())
        return result


class _Here:
    """The local engine of this actor, with what a cluster adds to some of its methods."""

    def __init__(self, settings: Any, make: Callable[[Any], Any], threads: int):
        self.engine, self.threads = make(settings), threads
        self._scores: Path | None = None
        self._opened: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def load(
        self, model: str, variant: Variant, *, opened: int, cancel: threading.Event, **named
    ) -> Iterator:
        """`opened` counts the comparisons: what was written anew since the last one is read anew."""
        from comparator.messages import Loaded

        if self._opened.get(model) != opened:
            for item in self.engine.open(model, cancel):
                if not isinstance(item, ModelFacts):
                    yield item
            self._opened[model] = opened
        for item in self.engine.load(model, variant, cancel, **named):
            yield replace(item, environment=self.environment()) if isinstance(item, Loaded) else item

    def environment(self) -> Environment:
        """With as many cores as torch uses here: a node may lend less than the machine has."""
        import psutil

        found, cores = self.engine.environment(), psutil.cpu_count() or self.threads
        if found.device != found.cpu or self.threads >= cores:
            return found
        lent = (found.cpu or "").replace(f", {cores} cores", f", {self.threads} of {cores} cores")
        return replace(found, device=lent, cpu=lent)

    def score(self, task: Any, cancel: threading.Event) -> Iterator[Any]:
        if isinstance(task, Beside):
            yield from self._beside(task, cancel)
            return
        if hasattr(task, "path"):  # scores stay on this node's disk
            task = replace(task, path=str(self._place(task.path)))
        yield from self.engine.score(task, cancel)

    def _beside(self, asked: Beside, cancel: threading.Event) -> Iterator[Any]:
        from comparator.messages import Loaded

        handle = None
        try:
            own = asked.task.handle
            for item in self.engine.load(
                asked.model,
                asked.variant,
                cancel,
                evict=False,
                keep=frozenset({own}),
                max_memory=asked.max_memory,
            ):
                if isinstance(item, Loaded):
                    handle = item.handle
                else:
                    yield item
            yield from self.engine.score(replace(asked.task, reference=handle), cancel)
        finally:
            if handle is not None:
                self.engine.unload(handle)

    def _place(self, path: str) -> Path:
        """Where a file of the app's folder for scores lies here."""
        from comparator.judge import scores_folder

        if self._scores is None:
            self._scores = scores_folder(self.engine.settings.cache_dir)
        folder = self._scores / Path(path).parent.name
        folder.mkdir(exist_ok=True)
        return folder / f"{Path(path).name}-{secrets.token_hex(4)}"

    def release_scores(self, name: str) -> None:
        import shutil

        if self._scores is not None:
            shutil.rmtree(self._scores / name, ignore_errors=True)

    def leave(self) -> int:
        """Unload everything, remove what was kept on disk; the bytes that came back."""
        import shutil

        back = self.engine.unload()
        if self._scores is not None:
            shutil.rmtree(self._scores, ignore_errors=True)
        return back
