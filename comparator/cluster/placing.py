"""What a variant needs → what is asked of Ray. Pure arithmetic: knows no Ray, no torch and no actor.

Ray does the placing, by resources: a share of a GPU (`num_gpus`), whole GPUs for a variant that no single one holds,
or on a cluster without GPUs a node's `memory`. What is decided here is only how much to ask for, on which nodes it
makes sense at all, and whether a resident variant has to go first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from comparator.cluster.survey import Found
from comparator.types import Problem

RESERVE_BYTES = 512 * 2**20  # activations, workspaces and the CUDA context of one run
PROCESS_BYTES = 768 * 2**20  # an actor with torch and transformers in it
CPUS = 0.01  # Ray's bookkeeping: only one variant of a node works at a time, and idle ones block nobody
SPREAD = 1.1  # whole layers do not fill GPUs evenly


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, as Ray and the machine itself tell."""

    id: str
    name: str
    total: dict[str, float]  # Ray's resources
    available: dict[str, float]
    found: Found | None = None
    refused: str | None = None

    @property
    def gpu_bytes(self) -> int:
        """What its smallest GPU holds; Ray chooses which."""
        gpus = self.found.gpus if self.found else ()
        return min((g.total_bytes for g in gpus), default=0) if self.total.get("GPU") else 0


@dataclass(frozen=True)
class Wanted:
    """What is asked of Ray: `resources` as `ray.remote(...)` takes them, on one of `nodes`."""

    resources: dict[str, float]
    nodes: tuple[str, ...]  # ids
    limits: dict[int | str, int] | None = None  # of an actor's several GPUs, for accelerate
    gpus: int = 0  # whole ones

    def has_room(self, node: Node) -> bool:
        return all(node.available.get(name, 0.0) + 1e-9 >= amount for name, amount in self._of_ray().items())

    def _of_ray(self) -> dict[str, float]:
        names = {"num_gpus": "GPU", "num_cpus": "CPU", "memory": "memory"}
        return {names[key]: amount for key, amount in self.resources.items()}

    def options(self) -> dict[str, Any]:
        """Keywords of an actor's `.options(...)`."""
        return {**self.resources, "label_selector": {"ray.io/node-id": f"in({','.join(self.nodes)})"}}


@dataclass(frozen=True)
class Resident:
    """What of ours is on a node."""

    key: Any
    node: str
    bytes: int
    last_used: float
    kept: bool = False


@dataclass(frozen=True)
class Ask:
    """One variant that wants a place. `budget_bytes`: most that all of ours may take on one node."""

    name: str
    needed_bytes: int
    max_memory: dict[int | str, int] | None = None
    budget_bytes: int | None = None
    nodes: tuple[Node, ...] = field(default_factory=tuple)


def wanted(ask: Ask) -> Wanted:
    """What to ask Ray for. Raises `Problem` where no node could ever hold it, with the figures."""
    usable = [n for n in ask.nodes if not n.refused and n.found]
    if not usable:
        reasons = "; ".join(f"{n.name}: {n.refused or 'it does not answer'}" for n in ask.nodes)
        raise Problem(
            f"No node of the Ray cluster can be used. {reasons or 'It has no nodes'}.",
            "Install the same versions on every machine: docs/cluster.md says how.",
        )
    if ask.budget_bytes is not None and ask.needed_bytes > ask.budget_bytes:
        raise Problem(
            f"{ask.name} needs about {gb(ask.needed_bytes)}, and the budget of a node is {gb(ask.budget_bytes)} "
            "(COMPARATOR_MEMORY_BUDGET).",
            "Raise the budget, or choose a smaller variant.",
        )
    if ask.max_memory:
        return _as_told(ask, usable)
    with_gpus = [n for n in usable if n.gpu_bytes]
    return _on_gpus(ask, with_gpus, usable) if with_gpus else _on_cpus(ask, usable)


def _on_gpus(ask: Ask, nodes: list[Node], usable: list[Node]) -> Wanted:
    needed = ask.needed_bytes + RESERVE_BYTES
    roomy = [n for n in nodes if n.gpu_bytes >= needed]
    if roomy:
        # By the smallest of them, so that the share is enough wherever Ray puts it.
        share = math.ceil(100 * needed / min(n.gpu_bytes for n in roomy)) / 100
        return Wanted({"num_cpus": CPUS, "num_gpus": min(1.0, share)}, tuple(n.id for n in roomy))
    several = [(math.ceil(SPREAD * needed / n.gpu_bytes), n) for n in nodes]
    possible = [(count, n) for count, n in several if count <= n.total["GPU"]]
    if not possible:
        most = max(nodes, key=lambda n: n.gpu_bytes * n.total.get("GPU", 0))
        raise Problem(
            f"{ask.name} needs about {gb(ask.needed_bytes)}, and no node's GPUs hold that together; {most.name} has "
            f"the most, {most.total['GPU']:g} × {gb(most.gpu_bytes)}.",
            "Choose a smaller variant or model.",
        )
    count = min(count for count, _ in possible)
    chosen = [n for c, n in possible if c == count]
    limit = min(n.gpu_bytes for n in chosen) - RESERVE_BYTES
    return Wanted(
        {"num_cpus": CPUS, "num_gpus": float(count)},
        tuple(n.id for n in chosen),
        dict.fromkeys(range(count), limit),
        gpus=count,
    )


def _on_cpus(ask: Ask, nodes: list[Node]) -> Wanted:
    needed = ask.needed_bytes + PROCESS_BYTES
    roomy = [n for n in nodes if n.total.get("memory", 0.0) >= needed and n.total.get("CPU", 0.0) >= CPUS]
    if not roomy:
        most = max((n.total.get("memory", 0.0) for n in nodes), default=0.0)
        raise Problem(
            f"{ask.name} needs about {gb(ask.needed_bytes)} and {gb(PROCESS_BYTES)} for its process; the largest node "
            f"of the Ray cluster lends {gb(int(most))} of memory.",
            "Choose a smaller variant, or let Ray lend more there (ray start --memory).",
        )
    return Wanted({"num_cpus": CPUS, "memory": float(needed)}, tuple(n.id for n in roomy))


def _as_told(ask: Ask, nodes: list[Node]) -> Wanted:
    """The limits that a person gave: so many GPUs of one node, and so much of its memory."""
    count = 1 + max((k for k in ask.max_memory if isinstance(k, int)), default=-1)
    memory = float(ask.max_memory.get("cpu", 0) + PROCESS_BYTES)
    roomy = [n for n in nodes if n.total.get("GPU", 0) >= count and n.total.get("memory", 0.0) >= memory]
    if not roomy:
        raise Problem(
            f"No node of the Ray cluster has {count} GPUs and lends {gb(int(memory))} of memory, as max_memory wants.",
            "Lower the limits; the page and docs/cluster.md show what the nodes have.",
        )
    resources = {"num_cpus": CPUS, "memory": memory} | ({"num_gpus": float(count)} if count else {})
    return Wanted(resources, tuple(n.id for n in roomy), dict(ask.max_memory), gpus=count)


def within_budget(ask: Ask, node: str, residents: Iterable[Resident]) -> bool:
    held = sum(r.bytes for r in residents if r.node == node)
    return ask.budget_bytes is None or held + ask.needed_bytes <= ask.budget_bytes


def open_nodes(ask: Ask, want: Wanted, residents: Iterable[Resident]) -> list[Node]:
    """Where there is room now."""
    residents = list(residents)
    return [
        n
        for n in ask.nodes
        if n.id in want.nodes and want.has_room(n) and within_budget(ask, n.id, residents)
    ]


def apart(want: Wanted, nodes: list[Node], residents: Iterable[Resident]) -> tuple[Wanted, list[Node]]:
    """The same on a device where nothing of ours is: a whole GPU, or another machine. As it was where none is free."""
    if "num_gpus" in want.resources:
        whole = replace(want, resources={**want.resources, "num_gpus": max(1.0, want.resources["num_gpus"])})
        free = [n for n in nodes if whole.has_room(n)]
        return (whole, free) if free else (want, nodes)
    taken = {r.node for r in residents}
    return want, [n for n in nodes if n.id not in taken] or nodes


def victim(want: Wanted, residents: Iterable[Resident]) -> Resident | None:
    """What to unload first: of what stands in the way, what this comparison does not need, used longest ago."""
    near = [r for r in residents if r.node in want.nodes]
    return min(near, key=lambda r: (r.kept, r.last_used), default=None)


def no_room(ask: Ask, want: Wanted) -> Problem:
    """Figures of what is free, by node."""
    free = []
    for node in ask.nodes:
        if node.id in want.nodes:
            gpus = f"{node.available.get('GPU', 0):.2g} of {node.total.get('GPU', 0):g} GPUs"
            memory = f"{gb(int(node.available.get('memory', 0)))} of memory"
            free.append(f"{node.name}: {gpus if 'num_gpus' in want.resources else memory}")
    return Problem(
        f"{ask.name} needs about {gb(ask.needed_bytes)}, and no node of the Ray cluster has that to lend now "
        f"({'; '.join(free)}).",
        "Unload variants here, or wait until other users of the cluster have finished.",
    )


def gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
