"""A real Ray on this machine: two nodes as processes, one CPU each, started once for all of these tests.

Nodes are processes of their own (raylet, workers), so what is tested is what a cluster does; only the network is short.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="requirements-ray.txt is not installed")

ROOT = Path(__file__).resolve().parent.parent.parent
NODE = {"object_store_memory": 100 * 2**20, "memory": 5 * 2**30, "num_cpus": 1, "num_gpus": 0}


def environment(**changes: str) -> dict[str, str]:
    # Ray runs actors at the lowest priority: beside the other worker of pytest they would hardly get to run.
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "COMPARATOR_RAY_WITHOUT_TOKEN": "1"}
    return {"PYTHONPATH": str(ROOT), **own, **changes}


class Machines:
    """The cluster, and ways to harm it."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        os.environ.update(environment())
        self.ray = Cluster(
            initialize_head=True,
            head_node_args={
                **NODE,
                "include_dashboard": False,
                "node_name": "alpha",
                # A node that refuses five times in a row is lost: after 5 s, not 15. A slow answer is no refusal.
                "_system_config": {"health_check_period_ms": 1000},
            },
        )
        self.ray.add_node(**NODE, node_name="beta")
        self.address = self.ray.address

    def add(self, name: str, **changes):
        return self.ray.add_node(**{**NODE, "node_name": name, **changes})

    def lose(self, node) -> None:
        """As if its power went: the raylet and everything that it started are gone at once."""
        import psutil

        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            process.kill()
        self.ray.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.ray.shutdown()


@pytest.fixture(scope="session")
def machines(builtin) -> Iterator[Machines]:
    machines = Machines()
    try:
        yield machines
    finally:
        machines.close()


@pytest.fixture(scope="module")
def shared(machines):
    """One engine for the tests that do no harm to it."""
    yield from _engine(machines)


@pytest.fixture
def engine(machines):
    """An engine of its own: a driver, and no actor yet."""
    yield from _engine(machines)


def _engine(machines):
    from comparator.cluster import ClusterEngine
    from comparator.core.settings import Settings

    engine = ClusterEngine(Settings(ray_address=machines.address, max_new_tokens=512))
    try:
        yield engine
    finally:
        engine.close()
