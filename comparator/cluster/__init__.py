"""The same comparison over a Ray cluster: each resident variant in an actor of its own, placed by what it needs.

`ClusterEngine` is what the rest of the program talks to (comparator/seam.py). It starts one child process, the driver,
which is the only one that imports Ray besides the actors: Ray ends a process whose cluster is gone, and the page must
outlive that. docs/cluster.md says how to use it, docs/architecture.md how it works.
"""

from comparator.cluster.engine import ClusterEngine

__all__ = ["ClusterEngine"]
