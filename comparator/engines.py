"""The engine and the training jobs of this process: local, or over the Ray cluster whose address is set."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from comparator.core.settings import get_settings
from comparator.engine.protocol import Engine

if TYPE_CHECKING:
    from comparator.training.registry import Trainings


@cache
def get_engine() -> Engine:
    """The engine of this process: its own, or the cluster's where COMPARATOR_RAY_ADDRESS is set."""
    if not get_settings().ray_address:
        from comparator.deploy.process_engine import process_engine

        return process_engine()
    from comparator.cluster import ClusterEngine

    return ClusterEngine(get_settings())


@cache
def get_trainings() -> Trainings:
    """The training jobs of this process, on its engine."""
    from comparator.training.registry import Trainings

    return Trainings(get_engine())
