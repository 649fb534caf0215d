"""The cluster as one engine: which actor holds what, where the next one goes, and what happens when one is lost.

Lives in the driver's process. Placing is Ray's, by resources (placing.py says how much to ask for); streams are Ray's;
that an actor or a node is gone, Ray tells. One piece of work at a time has a device (`_device`), several devices may work
at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from comparator.cluster import failures, placing, rays, routes
from comparator.cluster.actor import Holder
from comparator.cluster.held import Held, Key, node_state
from comparator.hosting import Raised, Returned
from comparator.messages import Loaded, Progress
from comparator.settings import Settings
from comparator.types import (
    Adapter,
    Cell,
    EngineState,
    GenerationSettings,
    ModelFacts,
    Problem,
    Stopped,
    Variant,
)

PLACING_S = (
    90.0  # Ray has said there is room: a process starts and imports within that, or something is wrong
)
CLERK_BYTES = 512 * 2**20


class Conductor:
    """Methods as those of `comparator.engine.Engine`; each may run on any thread."""

    def __init__(self, settings: Settings, on_change: Callable[[EngineState], None] = lambda state: None):
        self.settings, self.on_change = settings, on_change
        self._held: dict[Key, Held] = {}
        self._nodes: tuple[placing.Node, ...] = ()
        self._opened = 0
        self._lock = threading.RLock()  # who holds what
        self._placing = threading.RLock()  # one at a time looks for a place
        self._lanes: dict[str, threading.Lock] = {}

    # ------------------------------------------------------------ what is there

    def start(self) -> None:
        rays.connect(self.settings.ray_address)
        self.refresh()

    def refresh(self) -> None:
        """Look at the nodes anew and tell."""
        self._nodes = rays.nodes()
        self._tell()

    def _tell(self) -> None:
        self.on_change(self.state())

    def state(self) -> EngineState:
        with self._lock:
            held = list(self._held.values())
        nodes = tuple(node_state(n) for n in self._nodes)
        devices = [d for n in nodes if not n.refused for d in n.devices]
        many = len(nodes)
        return EngineState(
            device=f"Ray cluster, {many} node" + "s" * (many != 1),
            total_bytes=sum(d.total_bytes or 0 for d in devices) or None,
            free_bytes=sum(d.free_bytes or 0 for d in devices) or None,
            budget_bytes=self.settings.budget_bytes,
            ready=bool(self._nodes),
            residents=tuple(replace(r, node=h.node, device=h.device) for h in held for r in h.residents),
            nodes=nodes,
        )

    def _of(self, handle: str | None) -> Held | None:
        with self._lock:
            return next(
                (h for h in self._held.values() if any(r.handle == handle for r in h.residents)), None
            )

    def _must(self, handle: str) -> Held:
        held = self._of(handle)
        if held is None:
            raise Problem("This variant is no longer loaded.", "Run again: it loads once more.")
        held.last_used = time.monotonic()
        return held

    def lane(self, handle: str) -> str | None:
        held = self._of(handle)
        return " ".join(held.lanes) if held else None

    def together(self, *handles: str | None) -> bool:
        places = [self._of(h) for h in handles]
        return None not in places and len({id(p) for p in places}) == 1

    # ------------------------------------------------------------ asking an actor

    def _through(
        self,
        held: Held,
        doing: str,
        cancel: threading.Event,
        name: str,
        *arguments: Any,
        stoppable=True,
        **named: Any,
    ) -> Iterator[Any]:
        """What a method of its engine yields. An actor that is lost is forgotten, and told as a `Problem`."""
        import ray

        try:
            with contextlib.closing(
                rays.batches(held.actor, cancel, name, arguments, named, stoppable)
            ) as found:
                for batch in found:
                    for item in batch:
                        if isinstance(item, Raised):
                            raise item.error
                        yield item.value if isinstance(item, Returned) else item
        except ray.exceptions.RayError as error:
            self._forget(held)
            raise failures.lost(error, doing, held.place) from None
        finally:
            held.last_used = time.monotonic()

    def _call(self, held: Held, doing: str, name: str, *arguments: Any, **named: Any) -> Any:
        never = threading.Event()
        (found,) = self._through(held, doing, never, name, *arguments, stoppable=False, **named)
        return found

    def _forget(self, held: Held) -> None:
        """End the actor and let go of it; what it had, Ray takes back."""
        with self._lock:
            if self._held.get(held.key) is held:
                del self._held[held.key]
        rays.end(held.actor)
        self._tell()

    @contextlib.contextmanager
    def _device(self, held: Held) -> Iterator[None]:
        """Alone on its devices: columns of one device never run at the same time."""
        with self._lock:
            locks = [self._lanes.setdefault(lane, threading.Lock()) for lane in held.lanes]
        with contextlib.ExitStack() as stack:
            for lock in locks:  # in the order of their names, so that no two wait for each other
                stack.enter_context(lock)
            yield

    # ------------------------------------------------------------ the clerk: models and prompts, no variant

    def _clerk(self, cancel: threading.Event) -> Held:
        with self._placing:
            held = self._held.get(("clerk",))
            if held is None:
                self.refresh()
                usable = tuple(n.id for n in self._nodes if not n.refused)
                if not usable:
                    placing.wanted(placing.Ask("The model", 0, nodes=self._nodes))  # says why
                want = placing.Wanted({"num_cpus": placing.CPUS, "memory": float(CLERK_BYTES)}, usable)
                held = self._started(("clerk",), want, "reading the model", cancel, CLERK_BYTES)
            return held

    def _ask_clerk(self, name: str, *arguments: Any, cancel: threading.Event | None = None) -> Iterator[Any]:
        """Reading a model twice does no harm, so a clerk that is lost is replaced once and asked again."""
        never, doing = threading.Event(), "reading the model"
        for again in (True, False):
            held = self._clerk(cancel or never)
            try:
                yield from self._through(
                    held, doing, cancel or never, name, *arguments, stoppable=cancel is not None
                )
                return
            except Problem:
                if not again or self._held.get(held.key) is held:  # the model's own trouble, not the actor's
                    raise

    def open(self, model: str, cancel: threading.Event) -> Iterator[Progress | ModelFacts]:
        self._opened += 1
        yield from self._ask_clerk("open", model, cancel=cancel)

    def complete(self, model: str, cell: Cell, cancel: threading.Event) -> Iterator[Progress | Cell]:
        yield from self._ask_clerk("complete", model, cell, cancel=cancel)

    def encode(self, model: str, prompt: str, system: str | None, chat: bool | None) -> Any:
        (prompt,) = self._ask_clerk("encode", model, prompt, system, chat)
        return prompt

    def environment(self) -> Any:
        (found,) = self._ask_clerk("environment")
        return found

    # ------------------------------------------------------------ a variant's actor

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
        private = adapter.notation if adapter is not None and adapter.merged else ""
        key = (model, variant.notation, str(max_memory or ""), private)
        with self._placing:
            held = self._held.get(key)
            if held is None:
                yield Progress(0.0, "looking for a place in the cluster")
                held = yield from self._placed(key, model, variant, max_memory, evict, keep, cancel, apart)
        limits = max_memory or held.limits
        fresh = not held.residents
        try:
            with self._device(held):
                for item in self._through(
                    held, f"loading {variant.notation}", cancel, "load", model, variant,
                    opened=self._opened, max_memory=limits, adapter=adapter,
                ):  # fmt: skip
                    yield self._loaded(held, item) if isinstance(item, Loaded) else item
        except (Problem, Stopped):
            if fresh:
                self._forget(held)  # nothing is left of what did not load
            raise

    def _loaded(self, held: Held, loaded: Loaded) -> Loaded:
        environment = replace(loaded.environment, host=held.node)
        held.device = environment.device or ""
        held.residents = rays.ask(held.actor, "residents")
        held.bytes = sum(r.bytes for r in held.residents)
        self._tell()
        return replace(loaded, environment=environment)

    def _placed(self, key, model, variant, max_memory, evict, keep, cancel, apart) -> Iterator[Any]:
        """A new actor where there is room, or where room can be made. Gives `Held`."""
        (needed,) = self._ask_clerk("needed_bytes", model, variant)
        ask = placing.Ask(variant.notation, needed, max_memory, self.settings.budget_bytes)
        while True:
            if cancel.is_set():
                raise Stopped
            self.refresh()
            ask = replace(ask, nodes=self._nodes)
            want = placing.wanted(ask)
            residents = self._residents(keep)
            open_nodes = placing.open_nodes(ask, want, residents)
            if open_nodes:
                break
            victim = placing.victim(want, residents) if evict else None
            if victim is None:
                raise placing.no_room(ask, want)
            yield Progress(0.0, "making room")
            self._leave(self._held[victim.key])
        if apart:
            want, open_nodes = placing.apart(want, open_nodes, residents)
        want = replace(want, nodes=tuple(n.id for n in open_nodes))
        yield Progress(0.0, f"starting an actor on {' or '.join(n.name for n in open_nodes)}")
        return self._started(key, want, f"starting for {variant.notation}", cancel, needed)

    def _residents(self, keep: frozenset[str]) -> list[placing.Resident]:
        with self._lock:
            return [
                placing.Resident(
                    h.key, h.facts.node, h.bytes, h.last_used, any(r.handle in keep for r in h.residents)
                )
                for h in self._held.values()
                if h.residents
            ]

    def _started(
        self, key: Key, want: placing.Wanted, doing: str, cancel: threading.Event, needed: int
    ) -> Held:
        """Ask Ray for the actor and wait until it is there. Raises `Problem` or `Stopped`, then none is left."""
        import ray

        cores = {n.id: n.total.get("CPU", 0.0) for n in self._nodes}
        names = {n.id: n.name for n in self._nodes}
        actor = rays.actor(Holder, want.options(), cores)
        place = " or ".join(names[n] for n in want.nodes)
        try:
            answer, until = actor.facts.remote(), time.monotonic() + PLACING_S
            while not ray.wait([answer], timeout=0.2)[0]:
                if cancel.is_set():
                    raise Stopped
                if time.monotonic() > until:
                    raise Problem(
                        f"Ray found no place for an actor on {place} within {PLACING_S:g} s, though it had room to lend.",
                        "Others may have taken it; ray status on the head shows what is free. Run again.",
                    )
            facts = ray.get(answer)
        except ray.exceptions.RayError as error:
            rays.end(actor)
            raise failures.lost(error, doing, place) from None
        except BaseException:
            rays.end(actor)
            raise
        held = Held(key, actor, facts, names.get(facts.node, "node"), needed, want.limits)
        with self._lock:
            self._held[key] = held
        return held

    # ------------------------------------------------------------ work on what is resident

    def generate(
        self,
        handle: str,
        prompt: Any,
        settings: GenerationSettings,
        cancel: threading.Event,
        *,
        adapter: Adapter | None = None,
    ) -> Iterator[Any]:
        held = self._must(handle)
        with self._device(held):
            yield from self._through(
                held, "generating", cancel, "generate", handle, prompt, settings, adapter=adapter
            )

    def layers(self, handle: str, adapter: Adapter | None = None) -> Any:
        held = self._must(handle)
        return self._call(held, "reading the layers", "layers", handle, adapter)

    def score(self, task: Any, cancel: threading.Event) -> Iterator[Any]:
        """Where the models are that it needs (routes.py)."""
        with self._lock:
            everybody = list(self._held.values())
        held, task = routes.routed(task, self._must, everybody)
        if held is None:
            yield from self._ask_clerk("score", task, cancel=cancel)
            return
        with self._device(held):
            for item in self._through(held, "scoring", cancel, "score", task):
                yield routes.kept_at(item, held)

    def release_scores(self, name: str) -> None:
        with self._lock:
            actors = list(self._held.values())
        for held in actors:
            with contextlib.suppress(Problem):
                self._call(held, "removing scores", "release_scores", name)

    # ------------------------------------------------------------ letting go

    def unload(self, handle: str | None = None) -> int:
        """End the actor of a variant, or of all; bytes that came back."""
        with self._lock:
            gone = [h for h in self._held.values() if h.residents]
            gone = [h for h in gone if handle is None or any(r.handle == handle for r in h.residents)]
        return sum(self._leave(held) for held in gone)

    def _leave(self, held: Held) -> int:
        with self._device(held):
            back, before = 0, rays.available().get(held.facts.node, {})
            with contextlib.suppress(Problem):
                back = self._call(held, "unloading", "leave")
            self._forget(held)
            self._wait_for_end(held, before)
        return back

    def _wait_for_end(self, held: Held, before: dict[str, float]) -> None:
        """Ray gives a place to the next actor a moment after the last one is gone."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            now = rays.available().get(held.facts.node)
            if now is None or any(now.get(k, 0) > before.get(k, 0) for k in ("memory", "GPU")):
                return
            time.sleep(0.05)
