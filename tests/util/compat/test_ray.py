"""The private part of Ray is where comparator/util/compat/ray.py expects it."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("ray")


def test_what_the_nodes_have_left():
    from ray._private.state import available_resources_per_node

    assert not inspect.signature(available_resources_per_node).parameters, (
        "Ray is asked in another way: change available_resources"
    )
