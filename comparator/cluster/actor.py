"""The Ray actor in which one resident variant lives: an ordinary local engine, and what Ray needs to reach it.

Runs on a node. Times, peaks, energy and the environment are measured here, with this machine's clock.
"""

from __future__ import annotations

import os
import pickle
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparator.cluster.remote_tensors import ModuleNames, ModuleTensors, Packed, WithSecondModel
from comparator.cluster.rpc import Call, Host
from comparator.core.messages import Loaded, LoadRequest
from comparator.core.result import Environment
from comparator.core.settings import Settings, get_settings
from comparator.core.state import Resident
from comparator.deploy.limits import check_source
from comparator.engine.local import LocalEngine
from comparator.engine.protocol import OnProgress, ignore
from comparator.fidelity.logits_store import StoredLogits, scores_folder

INTERVAL_S = 0.004  # tokens are sent in batches: sending each would delay the next


@dataclass(frozen=True)
class Facts:
    """Where an actor runs. `device_ids`: Ray's ids of its GPUs; empty: it uses the CPU."""

    node: str
    pid: int
    device_ids: tuple[str, ...]


def visitors_limits(settings: Settings) -> dict[str, str]:
    """The variables that say what visitors of the app may open, for the actors that open it."""
    return {
        "COMPARATOR_PUBLIC": str(int(settings.public)),
        "COMPARATOR_ALLOWED_MODELS": settings.allowed_models,
        "COMPARATOR_ENDPOINTS": settings.endpoints,
    }


class EngineActor:
    """Holds one resident variant, or none and reads models and prompts. `cores` {node's id: CPUs that Ray lends there}:
    how many threads torch may use. `limits`: `visitors_limits` of the app."""

    def __init__(self, cores: dict[str, float], limits: dict[str, str]):
        import ray

        context = ray.get_runtime_context()
        self._ids = tuple(str(i) for i in context.get_accelerator_ids().get("GPU", ()))
        self._node = context.get_node_id()
        if not self._ids:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not requested belongs to another process
        available = max(1, int(cores.get(self._node, 0)) or os.cpu_count() or 1)
        self._threads = min(available, os.cpu_count() or 1)
        os.environ["OMP_NUM_THREADS"] = str(self._threads)  # before torch is imported; Ray's own default is 1
        # The node's own settings (cache folder, tokens); the scheduler enforces the budget for all actors of a node.
        # What visitors may open is the app's to say, not the node's: everything in this process reads its settings there.
        os.environ.update(limits)
        get_settings.cache_clear()
        settings = Settings().model_copy(update={"memory_budget": None, "ray_address": None})
        self.engine = ActorEngine(settings, self._threads)
        self.host = Host(self.engine, INTERVAL_S)
        self._pulled: dict[str, Iterator[bytes]] = {}
        self.engine.start()  # torch loads while the driver learns that the actor has started

    def facts(self) -> Facts:
        return Facts(self._node, os.getpid(), self._ids)

    # ------------------------------------------------------------ calls, by ticket

    def stream(self, call: Call) -> Iterator[bytes]:
        """A Ray generator of batches (comparator/cluster/rpc.py). Pickled here, since Ray's own pickling would hold the
        GIL while the next token is computed; Ray passes bytes on as they are."""
        for batch in self.host.serve(call):
            yield pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)

    def pull(self, call: Call) -> bytes | None:
        """The next batch, None after the last: for Ray Client (ray://…), which has no generators."""
        if call.ticket not in self._pulled:
            self._pulled[call.ticket] = self.stream(call)
        batch = next(self._pulled[call.ticket], None)
        if batch is None:
            del self._pulled[call.ticket]
        return batch

    def stop(self, ticket: str) -> None:
        self.host.stop(ticket)

    def residents(self) -> tuple[Resident, ...]:
        return self.engine.state().residents

    # ------------------------------------------------------------ for other actors

    def rows(self, logits: StoredLogits, start: int, end: int) -> Packed:
        """Logits that this actor has stored. Read concurrently with its other work."""
        return Packed.of(logits.rows(start, end))

    def module_names(self, handle: str) -> tuple[str, ...]:
        return self.engine.score(ModuleNames(handle), threading.Event())

    def module_tensors(self, handle: str, name: str) -> dict[str, Packed]:
        return self.engine.score(ModuleTensors(handle, name), threading.Event())


class ActorEngine(LocalEngine):
    """The local engine of an actor, with additions for a cluster. `threads`: of torch."""

    def __init__(self, settings: Settings, threads: int):
        super().__init__(settings, check_source)
        self.threads = threads
        self._scores: Path | None = None
        self._opened: dict[str, int] = {}

    def load_opened(
        self, request: LoadRequest, opened: int, cancel: threading.Event, on_progress: OnProgress
    ) -> Loaded:
        """`load`, after `open` if the counter `opened` has changed: then files may have changed too."""
        if self._opened.get(request.model) != opened:
            self.open(request.model, cancel, on_progress)
            self._opened[request.model] = opened
        loaded = self.load(request, cancel, on_progress)
        return replace(loaded, environment=loaded.environment or self.environment())

    def environment(self) -> Environment:
        """With the number of cores that torch uses here, which may be fewer than the machine has."""
        import psutil

        environment, cores = super().environment(), psutil.cpu_count() or self.threads
        if environment.device != environment.cpu or self.threads >= cores:
            return environment
        cpu = (environment.cpu or "").replace(f", {cores} cores", f", {self.threads} of {cores} cores")
        return replace(environment, device=cpu, cpu=cpu)

    def score(self, task: Any, cancel: threading.Event, on_progress: OnProgress = ignore) -> Any:
        if isinstance(task, WithSecondModel):
            return self._with_second_model(task, cancel, on_progress)
        if hasattr(task, "path"):  # logits stay on this node's disk
            task = replace(task, path=str(self._scores_path(task.path)))
        return super().score(task, cancel, on_progress)

    def _with_second_model(
        self, task: WithSecondModel, cancel: threading.Event, on_progress: OnProgress
    ) -> Any:
        request = LoadRequest(
            task.model,
            task.variant,
            max_memory=task.max_memory,
            evict=False,
            keep=frozenset({task.task.handle}),
        )
        handle = self.load(request, cancel, on_progress).handle
        try:
            return self.score(replace(task.task, reference=handle), cancel, on_progress)
        finally:
            self.unload(handle)

    def _scores_path(self, path: str) -> Path:
        """The path on this node for a file of the app's folder for logits."""
        if self._scores is None:
            self._scores = scores_folder(self.settings.cache_dir)
        folder = self._scores / Path(path).parent.name
        folder.mkdir(exist_ok=True)
        return folder / f"{Path(path).name}-{secrets.token_hex(4)}"

    def release_scores(self, folder: Path) -> None:
        """Delete the logits stored on this node for the app's folder of that name."""
        if self._scores is not None:
            super().release_scores(self._scores / folder.name)

    def leave(self) -> int:
        """Unload everything and delete the stored logits; returns the bytes that were freed."""
        freed = self.unload()
        if self._scores is not None:
            super().release_scores(self._scores)
        return freed
