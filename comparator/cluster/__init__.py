"""Runs comparisons on a Ray cluster: each resident variant in its own actor, placed by the memory that it needs.

`ClusterEngine` is the `Engine` (comparator/engine/protocol.py) of the rest of the program. It starts one child process,
the driver, which alone imports Ray besides the actors: Ray ends a process that has lost its cluster, and the page must
survive that. See docs/cluster.md for its use and docs/architecture.md for its design.
"""

from comparator.cluster.engine import ClusterEngine

__all__ = ["ClusterEngine"]
