"""Who holds what: an actor of ours with what it is asked for and what is in it, and a node as the page shows it."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from comparator.cluster.actor import Facts
from comparator.cluster.placing import Node
from comparator.types import DeviceState, NodeState, Resident

Key = tuple


@dataclass
class Held:
    """An actor of ours and what it holds."""

    key: Key
    actor: Any
    facts: Facts
    node: str  # its name
    bytes: int  # asked for, then held
    limits: dict[int | str, int] | None = None
    device: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    residents: tuple[Resident, ...] = ()
    last_used: float = field(default_factory=time.monotonic)

    @property
    def place(self) -> str:
        return self.node if self.node.startswith("node ") else f"node {self.node}"

    @property
    def lanes(self) -> tuple[str, ...]:
        """The devices it works on."""
        return tuple(sorted(f"{self.facts.node} {i}" for i in self.facts.device_ids)) or (self.facts.node,)


def node_state(node: Node) -> NodeState:
    found = node.found
    if found is None:
        return NodeState(node.name, (), node.refused)
    gpus = found.gpus[: int(node.total.get("GPU", 0))]
    devices = tuple(DeviceState(g.name, g.total_bytes, g.free_bytes) for g in gpus)
    lent = max(1, int(node.total.get("CPU", 0)))
    of = f", {lent} of {found.cores} cores" if lent < found.cores else f", {found.cores} cores"
    name = found.cpu.replace(f", {found.cores} cores", of)
    cpu = DeviceState(name, found.memory_bytes, found.memory_free_bytes)
    return NodeState(node.name, devices or (cpu,), node.refused)
