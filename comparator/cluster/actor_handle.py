"""The scheduler's record of an actor, and a node's state for the page."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from comparator.cluster.actor import Facts
from comparator.cluster.placement import Node
from comparator.core.state import DeviceState, NodeState, Resident

Key = tuple


@dataclass
class ActorHandle:
    """An actor, its placement and its resident variants. `key`: what it was started for."""

    key: Key
    actor: Any  # Ray's handle
    facts: Facts
    node: str  # its name
    bytes: int  # requested, once loaded: resident
    limits: dict[int | str, int] | None = None
    device: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    residents: tuple[Resident, ...] = ()
    last_used: float = field(default_factory=time.monotonic)
    has_scores: bool = False  # logits that other columns are compared with; they are lost with the actor

    @property
    def place(self) -> str:
        return self.node if self.node.startswith("node ") else f"node {self.node}"

    @property
    def lanes(self) -> tuple[str, ...]:
        """The devices that it uses."""
        return tuple(sorted(f"{self.facts.node} {i}" for i in self.facts.device_ids)) or (self.facts.node,)


def node_state(node: Node) -> NodeState:
    info = node.info
    if info is None:
        return NodeState(node.name, (), node.refused)
    gpus = info.gpus[: int(node.total.get("GPU", 0))]
    devices = tuple(DeviceState(g.name, g.total_bytes, g.free_bytes) for g in gpus)
    available = max(1, int(node.total.get("CPU", 0)))
    cores = f"{available} of {info.cores} cores" if available < info.cores else f"{info.cores} cores"
    name = info.cpu.replace(f", {info.cores} cores", f", {cores}")
    cpu = DeviceState(name, info.memory_bytes, info.memory_free_bytes)
    return NodeState(node.name, devices or (cpu,), node.refused)
