"""A part of Ray without a public call; written for Ray 2.60."""

from __future__ import annotations

WRITTEN_FOR = "2.60"


def available_resources() -> dict[str, dict[str, float]]:
    """What each node has left to lend, as `ray status` shows it. Only in a process of the cluster, not through a client."""
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()
