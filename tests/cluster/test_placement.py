"""How much is asked of Ray, where, and what has to go first. Arithmetic: no Ray, no GPU."""

from __future__ import annotations

import pytest

from comparator.cluster import placement
from comparator.cluster.node_info import Gpu, NodeInfo, skew, versions
from comparator.cluster.placement import Ask, Node, Resident
from comparator.core.errors import UserError

GIB = 2**30


def node(name: str, gpus: int = 0, gpu_gib: int = 80, memory_gib: int = 64, cpus: int = 8, **changes) -> Node:
    total = {"CPU": float(cpus), "memory": float(memory_gib * GIB)} | ({"GPU": float(gpus)} if gpus else {})
    info = NodeInfo(
        versions(), "CPU", cpus, memory_gib * GIB, memory_gib * GIB,
        tuple(Gpu(f"GPU of {gpu_gib}", gpu_gib * GIB, gpu_gib * GIB) for _ in range(gpus)),
    )  # fmt: skip
    values = {"available": dict(total), "info": info, **changes}
    return Node(name, name, total, **values)


def ask(needed_gib: float, *nodes: Node, **changes) -> Ask:
    return Ask("bf16", int(needed_gib * GIB), nodes=nodes, **changes)


def test_a_variant_takes_a_share_of_a_gpu():
    want = placement.wanted(ask(16, node("a", gpus=2), node("b", gpus=1, gpu_gib=24)))
    assert want.nodes == ("a", "b") and want.gpus == 0
    assert want.resources["num_gpus"] == pytest.approx(16.5 / 24, abs=0.01), (
        "the share must be enough on the smallest GPU that Ray may choose"
    )
    assert placement.wanted(ask(30, node("a", gpus=2), node("b", gpus=1, gpu_gib=24))).nodes == ("a",)


def test_a_variant_that_no_gpu_holds_is_spread_over_one_nodes():
    want = placement.wanted(ask(140, node("a", gpus=2), node("b", gpus=4), node("c")))
    assert want.resources["num_gpus"] == 2 and set(want.nodes) == {"a", "b"}
    assert sum(want.limits.values()) > 140 * GIB and set(want.limits) == {0, 1}
    with pytest.raises(UserError, match="4 × 85.90 GB") as refused:
        placement.wanted(ask(400, node("a", gpus=2), node("b", gpus=4)))
    assert refused.value.advice


def test_without_gpus_memory_decides_and_with_them_cpus_are_left_alone():
    want = placement.wanted(ask(10, node("small", memory_gib=8), node("large")))
    assert want.nodes == ("large",) and "num_gpus" not in want.resources
    assert want.resources["memory"] > 10 * GIB
    assert placement.wanted(ask(10, node("a", gpus=1), node("large", memory_gib=512))).nodes == ("a",)
    with pytest.raises(UserError, match="ray start --memory|8.59 GB"):
        placement.wanted(ask(10, node("small", memory_gib=8)))


def test_limits_that_a_person_gave_are_kept():
    want = placement.wanted(
        ask(30, node("a", gpus=1), node("b", gpus=2), max_memory={0: 8 * GIB, 1: 8 * GIB, "cpu": GIB})
    )
    assert want.nodes == ("b",) and want.resources["num_gpus"] == 2 and want.limits[1] == 8 * GIB


def test_a_full_node_is_passed_over_and_the_least_recently_used_goes_first():
    full = node("full", gpus=1, available={"CPU": 8.0, "memory": 64.0 * GIB, "GPU": 0.1})
    asked = ask(40, full, node("free", gpus=1))
    want = placement.wanted(asked)
    assert [n.name for n in placement.open_nodes(asked, want, ())] == ["free"]
    held = [
        Resident("old", "full", 1, 1.0, needed=True),
        Resident("new", "full", 1, 9.0),
        Resident("mid", "full", 1, 5.0),
    ]
    assert placement.victim(want, held).key == "mid", "what this comparison needs goes last"
    assert placement.victim(want, [Resident("x", "elsewhere", 1, 0.0)]) is None
    assert "full: 0.1 of 1 GPUs" in placement.no_room(asked, want).problem


def test_the_budget_holds_a_node():
    asked = ask(6, node("a"), node("b"), budget_bytes=10 * GIB)
    want = placement.wanted(asked)
    held = [Resident("x", "a", 5 * GIB, 0.0)]
    assert [n.name for n in placement.open_nodes(asked, want, held)] == ["b"]
    with pytest.raises(UserError, match="COMPARATOR_MEMORY_BUDGET"):
        placement.wanted(ask(11, node("a"), budget_bytes=10 * GIB))


def test_apart_takes_a_whole_gpu_or_another_machine_where_one_is_free():
    two = node("a", gpus=2)
    want, _ = placement.on_own_device(placement.wanted(ask(8, two)), [two], ())
    assert want.resources["num_gpus"] == 1.0
    half = node("a", gpus=1, available={"CPU": 8.0, "memory": 64.0 * GIB, "GPU": 0.5})
    want, nodes = placement.on_own_device(placement.wanted(ask(8, half)), [half], ())
    assert want.resources["num_gpus"] < 1 and nodes == [half], "better beside another than not at all"
    cpus = [node("a"), node("b")]
    _, nodes = placement.on_own_device(placement.wanted(ask(8, *cpus)), cpus, [Resident("x", "a", 1, 0.0)])
    assert [n.name for n in nodes] == ["b"]


def test_nodes_that_cannot_be_used_are_named():
    with pytest.raises(UserError, match="a: other versions") as refused:
        placement.wanted(ask(1, node("a", refused="other versions (torch 2.12.0 there, 2.13.0 here)")))
    assert "torch 2.12.0 there, 2.13.0 here" in refused.value.problem
    ours = versions()
    assert skew(ours, dict(ours)) is None
    for name in ("torch", "transformers", "Python", "Quant Comparator"):
        assert skew(ours, ours | {name: "0"}).startswith(f"{name} 0 there"), f"{name} may differ unnoticed"
