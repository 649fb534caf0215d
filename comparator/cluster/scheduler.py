"""The cluster as one engine: tracks actors and their variants, starts and ends actors, and handles lost ones.

Runs in the driver's process. Ray places actors by the resources that placement.py computes, and reports lost actors and
nodes. Each device runs one task at a time (`_device`); several devices may work at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparator.cluster import errors, placement, ray_api, routing
from comparator.cluster.actor import EngineActor, visitors_limits
from comparator.cluster.actor_handle import ActorHandle, Key, node_state
from comparator.cluster.remote_tensors import RemoteLogits
from comparator.cluster.rpc import Call
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Generation, Loaded, LoadRequest, Prompt
from comparator.core.request import DEFAULT_TEMPLATE, ChatTemplate, GenerationSettings
from comparator.core.result import Environment, LayerRow
from comparator.core.settings import Settings
from comparator.core.state import EngineState, ModelFacts
from comparator.core.variant import Adapter, Cell
from comparator.engine.protocol import OnChunk, OnProgress, Task, ignore
from comparator.util import formatting

PLACING_S = (
    90.0  # Ray has said there is room: a process starts and imports within that, or something is wrong
)
READER: Key = ("reader",)  # the actor that reads models and prompts, without a variant
READER_BYTES = 512 * 2**20


class ClusterScheduler:
    """The methods of `comparator.engine.protocol.Engine`; thread-safe."""

    def __init__(self, settings: Settings, on_change: Callable[[EngineState], None] = lambda state: None):
        self.settings, self.on_change = settings, on_change
        self._actors: dict[Key, ActorHandle] = {}
        self._nodes: tuple[placement.Node, ...] = ()
        self._opened = 0
        self._lock = threading.RLock()  # of `_actors`
        self._placing = threading.RLock()  # one at a time looks for a place
        self._lanes: dict[str, threading.Lock] = {}

    # ------------------------------------------------------------ state

    def start(self) -> None:
        ray_api.connect(self.settings.ray_address, self.settings.ray_without_token)
        self.refresh()

    def refresh(self) -> None:
        """Update the nodes and report the state."""
        self._nodes = ray_api.nodes()
        self._report()

    def _report(self) -> None:
        self.on_change(self.state())

    def state(self) -> EngineState:
        nodes = tuple(node_state(n) for n in self._nodes)
        devices = [d for n in nodes if not n.refused for d in n.devices]
        return EngineState(
            device=f"Ray cluster, {formatting.plural(len(nodes), 'node')}",
            total_bytes=sum(d.total_bytes or 0 for d in devices) or None,
            free_bytes=sum(d.free_bytes or 0 for d in devices) or None,
            budget_bytes=self.settings.budget_bytes,
            ready=bool(self._nodes),
            residents=tuple(
                replace(r, node=a.node, device=a.device) for a in self._all() for r in a.residents
            ),
            nodes=nodes,
        )

    def _all(self) -> list[ActorHandle]:
        with self._lock:
            return list(self._actors.values())

    def _find(self, handle: str | None) -> ActorHandle | None:
        return next((a for a in self._all() if any(r.handle == handle for r in a.residents)), None)

    def _actor_of(self, handle: str) -> ActorHandle:
        actor = self._find(handle)
        if actor is None:
            raise UserError("This variant is no longer loaded.", "Run again to reload it.")
        actor.last_used = time.monotonic()
        return actor

    def lane(self, handle: str) -> str | None:
        actor = self._find(handle)
        return " ".join(actor.lanes) if actor else None

    def together(self, *handles: str | None) -> bool:
        actors = [self._find(h) for h in handles]
        return None not in actors and len({id(a) for a in actors}) == 1

    # ------------------------------------------------------------ calling an actor

    def _call(
        self,
        actor: ActorHandle,
        doing: str,
        call: Call,
        cancel: threading.Event | None = None,
        callback: Callable[..., None] = ignore,
    ) -> Any:
        """Call a method of the actor's engine. A lost actor is removed, and raises a `UserError`."""
        try:
            with self._noticing_loss(actor, doing):
                return ray_api.call_engine(actor.actor, call, cancel, callback)
        finally:
            actor.last_used = time.monotonic()

    @contextlib.contextmanager
    def _noticing_loss(self, actor: ActorHandle, doing: str) -> Iterator[None]:
        """While open, Ray's errors remove the actor, and raise a `UserError` that says what it was doing."""
        import ray

        try:
            yield
        except ray.exceptions.RayError as error:
            self._forget(actor)
            raise errors.lost(error, doing, actor.place) from None

    def _forget(self, actor: ActorHandle) -> None:
        """End and remove the actor, which frees its resources."""
        with self._lock:
            if self._actors.get(actor.key) is actor:
                del self._actors[actor.key]
        ray_api.end(actor.actor)
        self._report()

    @contextlib.contextmanager
    def _device(self, actor: ActorHandle) -> Iterator[None]:
        """A context with exclusive use of the actor's devices: columns of one device never run at the same time."""
        with self._lock:
            locks = [self._lanes.setdefault(lane, threading.Lock()) for lane in actor.lanes]
        with contextlib.ExitStack() as stack:
            for lock in locks:  # in the order of their names, to avoid deadlocks
                stack.enter_context(lock)
            yield

    # ------------------------------------------------------------ models and prompts

    def _reader(self, cancel: threading.Event | None) -> ActorHandle:
        with self._placing:
            actor = self._actors.get(READER)
            if actor is None:
                self.refresh()
                usable = tuple(n.id for n in self._nodes if not n.refused)
                if not usable:
                    placement.wanted(
                        placement.Ask("The model", 0, nodes=self._nodes)
                    )  # raises, with the reason
                want = placement.Wanted({"num_cpus": placement.CPUS, "memory": float(READER_BYTES)}, usable)
                actor = self._started(READER, want, "reading the model", cancel, READER_BYTES)
            return actor

    def _call_reader(
        self, call: Call, cancel: threading.Event | None = None, callback: Callable[..., None] = ignore
    ) -> Any:
        """Call the reader; a lost one is replaced and called once more, since reading a model twice is harmless."""
        actor = self._reader(cancel)
        try:
            return self._call(actor, "reading the model", call, cancel, callback)
        except UserError:
            if self._actors.get(actor.key) is actor:  # an error of the model, not a lost actor
                raise
        return self._call(self._reader(cancel), "reading the model", call, cancel, callback)

    def open(self, model: str, cancel: threading.Event, on_progress: OnProgress = ignore) -> ModelFacts:
        self._opened += 1
        return self._call_reader(Call("open", (model,), {}, True, "on_progress"), cancel, on_progress)

    def complete(
        self, model: str, cell: Cell, cancel: threading.Event, on_progress: OnProgress = ignore
    ) -> Cell:
        return self._call_reader(
            Call("complete", (model, cell), {}, True, "on_progress"), cancel, on_progress
        )

    def encode(
        self,
        model: str,
        prompt: str,
        system: str | None,
        chat: bool | None,
        template: ChatTemplate = DEFAULT_TEMPLATE,
        history: tuple[tuple[str, str], ...] = (),
    ) -> Prompt:
        return self._call_reader(Call("encode", (model, prompt, system, chat, template, history)))

    def environment(self) -> Environment:
        return self._call_reader(Call("environment"))

    # ------------------------------------------------------------ a variant's actor

    def load(self, request: LoadRequest, cancel: threading.Event, on_progress: OnProgress = ignore) -> Loaded:
        variant, adapter = request.variant, request.adapter
        private = adapter.notation if adapter is not None and adapter.merged else ""
        key = (request.model, variant.notation, str(request.max_memory or ""), private)
        with self._placing:
            actor = self._actors.get(key)
            if actor is None:
                on_progress(0.0, "looking for a node in the cluster")
                actor = self._place(key, request, cancel, on_progress)
        fresh = not actor.residents
        # Eviction is decided here, where all actors are known.
        inner = replace(
            request, max_memory=request.max_memory or actor.limits, evict=True, keep=frozenset(), prefer_own_device=False
        )  # fmt: skip
        call = Call("load_opened", (inner, self._opened), {}, True, "on_progress")
        try:
            with self._device(actor):
                loaded = self._call(actor, f"loading {variant.notation}", call, cancel, on_progress)
                return self._loaded(actor, loaded)
        except (UserError, Stopped):
            if fresh:
                self._forget(actor)  # frees an actor whose first variant did not load
            raise

    def _loaded(self, actor: ActorHandle, loaded: Loaded) -> Loaded:
        environment = replace(loaded.environment, host=actor.node)
        actor.device = environment.device or ""
        with self._noticing_loss(actor, "loading"):  # it may die after the answer that it has loaded
            actor.residents = ray_api.ask(actor.actor, "residents")
        actor.bytes = sum(r.bytes for r in actor.residents)
        self._report()
        return replace(loaded, environment=environment)

    def _place(
        self, key: Key, request: LoadRequest, cancel: threading.Event, on_progress: OnProgress
    ) -> ActorHandle:
        """A new actor on a node with enough memory, after unloading others if necessary. Raises `UserError`, `Stopped`."""
        notation = request.variant.notation
        needed = self._call_reader(Call("needed_bytes", (request.model, request.variant)))
        ask = placement.Ask(notation, needed, request.max_memory, self.settings.budget_bytes)
        while True:
            if cancel.is_set():
                raise Stopped
            self.refresh()
            ask = replace(ask, nodes=self._nodes)
            want = placement.wanted(ask)
            residents = self._residents(request.keep)
            open_nodes = placement.open_nodes(ask, want, residents)
            if open_nodes:
                break
            victim = placement.victim(want, residents) if request.evict else None
            if victim is None:
                raise placement.no_room(ask, want)
            on_progress(0.0, "unloading other variants")
            self._leave(self._actors[victim.key])
        if request.prefer_own_device:
            want, open_nodes = placement.on_own_device(want, open_nodes, residents)
        want = replace(want, nodes=tuple(n.id for n in open_nodes))
        on_progress(0.0, f"starting an actor on {' or '.join(n.name for n in open_nodes)}")
        return self._started(key, want, f"starting for {notation}", cancel, needed)

    def _residents(self, keep: frozenset[str]) -> list[placement.Resident]:
        return [
            placement.Resident(
                a.key,
                a.facts.node,
                a.bytes,
                a.last_used,
                a.has_scores or any(r.handle in keep for r in a.residents),
            )
            for a in self._all()
            if a.residents
        ]

    def _started(
        self, key: Key, want: placement.Wanted, doing: str, cancel: threading.Event | None, needed: int
    ) -> ActorHandle:
        """Request an actor and wait until it has started. Raises `UserError` or `Stopped` after ending it."""
        import ray

        cores = {n.id: n.total.get("CPU", 0.0) for n in self._nodes}
        names = {n.id: n.name for n in self._nodes}
        handle = ray_api.actor(EngineActor, want.options(), cores, visitors_limits(self.settings))
        place = " or ".join(names[n] for n in want.nodes)
        try:
            answer, until = handle.facts.remote(), time.monotonic() + PLACING_S
            while not ray.wait([answer], timeout=0.2)[0]:
                if cancel is not None and cancel.is_set():
                    raise Stopped
                if time.monotonic() > until:
                    raise UserError(
                        f"Ray found no place for an actor on {place} within {PLACING_S:g} s, although it reported enough "
                        "free resources.",
                        "Others may have taken it; ray status on the head shows what is free. Run again.",
                    )
            facts = ray.get(answer)
        except ray.exceptions.RayError as error:
            ray_api.end(handle)
            raise errors.lost(error, doing, place) from None
        except BaseException:
            ray_api.end(handle)
            raise
        actor = ActorHandle(key, handle, facts, names.get(facts.node, "node"), needed, want.limits)
        with self._lock:
            self._actors[key] = actor
        return actor

    # ------------------------------------------------------------ work on resident variants

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
        actor = self._actor_of(handle)
        call = Call("generate", (handle, prompt, settings), {"adapter": adapter}, True, "on_chunk")
        with self._device(actor):
            return self._call(actor, "generating", call, cancel, on_chunk)

    def layers(self, handle: str, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        return self._call(self._actor_of(handle), "reading the layers", Call("layers", (handle, adapter)))

    def score(self, task: Task, cancel: threading.Event, on_progress: OnProgress = ignore) -> Any:
        """Run a task in the actor that has its models (routing.py)."""
        actor, task = routing.routed(task, self._actor_of, self._all())
        call = Call("score", (task,), {}, True, "on_progress")
        if actor is None:
            return self._call_reader(call, cancel, on_progress)
        with self._device(actor):
            result = routing.stored_at(self._call(actor, "scoring", call, cancel, on_progress), actor)
        actor.has_scores |= isinstance(result, RemoteLogits)
        return result

    def release_scores(self, folder: Path) -> None:
        for actor in self._all():
            with contextlib.suppress(UserError):
                self._call(actor, "removing scores", Call("release_scores", (folder,)))
            actor.has_scores = False

    # ------------------------------------------------------------ unloading

    def unload(self, handle: str | None = None) -> int:
        """End the actor of a variant, or of all; returns the freed bytes."""
        actors = [self._find(handle)] if handle is not None else [a for a in self._all() if a.residents]
        return sum(self._leave(actor) for actor in actors if actor is not None)

    def _leave(self, actor: ActorHandle) -> int:
        with self._device(actor):
            freed, before = 0, ray_api.available().get(actor.facts.node, {})
            with contextlib.suppress(UserError):
                freed = self._call(actor, "unloading", Call("leave"))
            self._forget(actor)
            self._wait_for_end(actor, before)
        return freed

    def _wait_for_end(self, actor: ActorHandle, before: dict[str, float]) -> None:
        """Wait until Ray has freed the actor's resources, which happens a moment after it has ended."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            now = ray_api.available().get(actor.facts.node)
            if now is None or any(now.get(k, 0) > before.get(k, 0) for k in ("memory", "GPU")):
                return
            time.sleep(0.05)
