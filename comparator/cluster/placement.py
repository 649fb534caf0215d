"""The memory that a variant needs → the resources to request from Ray.

Ray places actors by resources: a fraction of a GPU (`num_gpus`), whole GPUs for a variant that does not fit on one, or
on a cluster without GPUs a node's `memory`. This module computes the amounts, the nodes that qualify, and which resident
variant to unload first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from comparator.cluster.node_info import NodeInfo
from comparator.core.errors import UserError

RESERVE_BYTES = 512 * 2**20  # activations, workspaces and the CUDA context of one run
PROCESS_BYTES = 768 * 2**20  # an actor with torch and transformers in it
CPUS = 0.01  # nominal: variants of a node run one at a time, and idle ones must not reserve cores
SPREAD = 1.1  # whole layers do not fill GPUs evenly


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, as reported by Ray and by the machine itself."""

    id: str
    name: str
    total: dict[str, float]  # Ray's resources
    available: dict[str, float]
    info: NodeInfo | None = None
    refused: str | None = None

    @property
    def gpu_bytes(self) -> int:
        """Memory of its smallest GPU, since Ray chooses the GPU; 0 without GPUs."""
        gpus = self.info.gpus if self.info else ()
        return min((g.total_bytes for g in gpus), default=0) if self.total.get("GPU") else 0


@dataclass(frozen=True)
class Wanted:
    """A request to Ray: `resources` as in `ray.remote(...)`, on one of `nodes`."""

    resources: dict[str, float]
    nodes: tuple[str, ...]  # ids
    limits: dict[int | str, int] | None = None  # of an actor's several GPUs, for accelerate
    gpus: int = 0  # whole ones

    def fits(self, node: Node) -> bool:
        return all(node.available.get(name, 0.0) + 1e-9 >= amount for name, amount in self._of_ray().items())

    def _of_ray(self) -> dict[str, float]:
        names = {"num_gpus": "GPU", "num_cpus": "CPU", "memory": "memory"}
        return {names[key]: amount for key, amount in self.resources.items()}

    def options(self) -> dict[str, Any]:
        """Keywords of an actor's `.options(...)`."""
        return {**self.resources, "label_selector": {"ray.io/node-id": f"in({','.join(self.nodes)})"}}


@dataclass(frozen=True)
class Resident:
    """A variant that is resident on a node."""

    key: Any
    node: str
    bytes: int
    last_used: float
    needed: bool = False  # by the comparison that asks


@dataclass(frozen=True)
class Ask:
    """One variant to place. `budget_bytes`: the most that all variants may take on one node."""

    name: str
    needed_bytes: int
    max_memory: dict[int | str, int] | None = None
    budget_bytes: int | None = None
    nodes: tuple[Node, ...] = field(default_factory=tuple)


def wanted(ask: Ask) -> Wanted:
    """The request to Ray for a variant. Raises `UserError` with figures if it fits on no node."""
    usable = [n for n in ask.nodes if not n.refused and n.info]
    if not usable:
        reasons = "; ".join(f"{n.name}: {n.refused or 'it does not answer'}" for n in ask.nodes)
        raise UserError(
            f"No node of the Ray cluster can be used. {reasons or 'It has no nodes'}.",
            "Install the same versions on every machine: docs/cluster.md says how.",
        )
    if ask.budget_bytes is not None and ask.needed_bytes > ask.budget_bytes:
        raise UserError(
            f"{ask.name} needs about {gb(ask.needed_bytes)}, and the budget of a node is {gb(ask.budget_bytes)} "
            "(COMPARATOR_MEMORY_BUDGET).",
            "Raise the budget, or choose a smaller variant.",
        )
    if ask.max_memory:
        return _within_limits(ask, usable)
    with_gpus = [n for n in usable if n.gpu_bytes]
    return _on_gpus(ask, with_gpus, usable) if with_gpus else _on_cpus(ask, usable)


def _on_gpus(ask: Ask, nodes: list[Node], usable: list[Node]) -> Wanted:
    needed = ask.needed_bytes + RESERVE_BYTES
    roomy = [n for n in nodes if n.gpu_bytes >= needed]
    if roomy:
        # Of the smallest of them, so that the share is enough wherever Ray places it.
        share = math.ceil(100 * needed / min(n.gpu_bytes for n in roomy)) / 100
        return Wanted({"num_cpus": CPUS, "num_gpus": min(1.0, share)}, tuple(n.id for n in roomy))
    several = [(math.ceil(SPREAD * needed / n.gpu_bytes), n) for n in nodes]
    possible = [(count, n) for count, n in several if count <= n.total["GPU"]]
    if not possible:
        most = max(nodes, key=lambda n: n.gpu_bytes * n.total.get("GPU", 0))
        raise UserError(
            f"{ask.name} needs about {gb(ask.needed_bytes)}, and no node has that much GPU memory in total; {most.name} has "
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
        raise UserError(
            f"{ask.name} needs about {gb(ask.needed_bytes)} and {gb(PROCESS_BYTES)} for its process; the largest node "
            f"of the Ray cluster offers {gb(int(most))} of memory.",
            "Choose a smaller variant, or let Ray offer more there (ray start --memory).",
        )
    return Wanted({"num_cpus": CPUS, "memory": float(needed)}, tuple(n.id for n in roomy))


def _within_limits(ask: Ask, nodes: list[Node]) -> Wanted:
    """The limits of `max_memory`: so many GPUs of one node, and so much of its memory."""
    count = 1 + max((k for k in ask.max_memory if isinstance(k, int)), default=-1)
    memory = float(ask.max_memory.get("cpu", 0) + PROCESS_BYTES)
    roomy = [n for n in nodes if n.total.get("GPU", 0) >= count and n.total.get("memory", 0.0) >= memory]
    if not roomy:
        raise UserError(
            f"No node of the Ray cluster has {count} GPUs and {gb(int(memory))} of memory to offer, which max_memory "
            "requires.",
            "Lower the limits; the page and docs/cluster.md show what the nodes have.",
        )
    resources = {"num_cpus": CPUS, "memory": memory} | ({"num_gpus": float(count)} if count else {})
    return Wanted(resources, tuple(n.id for n in roomy), dict(ask.max_memory), gpus=count)


def within_budget(ask: Ask, node: str, residents: Iterable[Resident]) -> bool:
    used = sum(r.bytes for r in residents if r.node == node)
    return ask.budget_bytes is None or used + ask.needed_bytes <= ask.budget_bytes


def open_nodes(ask: Ask, want: Wanted, residents: Iterable[Resident]) -> list[Node]:
    """The nodes where the variant fits now."""
    residents = list(residents)
    return [
        n for n in ask.nodes if n.id in want.nodes and want.fits(n) and within_budget(ask, n.id, residents)
    ]


def on_own_device(
    want: Wanted, nodes: list[Node], residents: Iterable[Resident]
) -> tuple[Wanted, list[Node]]:
    """(request, nodes) for a device without resident variants: a whole GPU, or another machine. Unchanged if there is
    none."""
    if "num_gpus" in want.resources:
        exclusive = replace(
            want, resources={**want.resources, "num_gpus": max(1.0, want.resources["num_gpus"])}
        )
        free = [n for n in nodes if exclusive.fits(n)]
        return (exclusive, free) if free else (want, nodes)
    occupied = {r.node for r in residents}
    return want, [n for n in nodes if n.id not in occupied] or nodes


def victim(want: Wanted, residents: Iterable[Resident]) -> Resident | None:
    """The variant to unload first on these nodes: one that this comparison does not need, least recently used."""
    near = [r for r in residents if r.node in want.nodes]
    return min(near, key=lambda r: (r.needed, r.last_used), default=None)


def no_room(ask: Ask, want: Wanted) -> UserError:
    """The error for a variant that fits nowhere now, with each node's free resources."""
    free = []
    for node in ask.nodes:
        if node.id in want.nodes:
            gpus = f"{node.available.get('GPU', 0):.2g} of {node.total.get('GPU', 0):g} GPUs"
            memory = f"{gb(int(node.available.get('memory', 0)))} of memory"
            free.append(f"{node.name}: {gpus if 'num_gpus' in want.resources else memory}")
    return UserError(
        f"{ask.name} needs about {gb(ask.needed_bytes)}, and no node of the Ray cluster can offer that now "
        f"({'; '.join(free)}).",
        "Unload variants here, or wait until other users of the cluster have finished.",
    )


def gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
