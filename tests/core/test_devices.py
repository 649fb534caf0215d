"""Columns on unlike devices: said on top, and each ratio between them marked, in every form that is written."""

from __future__ import annotations

from dataclasses import replace

import sample

from comparator.core import devices, document
from comparator.core.result import Environment
from comparator.metrics.definitions import METRICS
from comparator.reporting import csv_export, export, markdown, ratios, summary
from comparator.ui.panel import cluster, header, residents
from comparator.ui.results import summary as page_summary
from comparator.ui.tabs import latency
from comparator.ui.view_state import Live


def placed(**hosts: tuple[str, str]):
    """The sample's columns, each on a device of a host."""
    comparison = sample.comparison()
    cells = tuple(
        replace(c, environment=Environment(device=hosts[c.variant][0], host=hosts[c.variant][1]))
        if c.variant in hosts
        else c
        for c in comparison.cells
    )
    return replace(comparison, cells=cells)


UNLIKE = dict(bf16=("NVIDIA H200", "gpu-1"), nf4=("NVIDIA L4", "gpu-2"))
ALIKE = dict(bf16=("NVIDIA H200", "gpu-1"), nf4=("NVIDIA H200", "gpu-2"))


def test_it_is_said_on_top_of_every_report():
    comparison = placed(**UNLIKE)
    said = devices.unlike(comparison.cells)
    assert "bf16 on NVIDIA H200 (gpu-1)" in said and "NVIDIA L4 (gpu-2)" in said
    assert dict(summary.headline(comparison))["Warning"] == said
    for text in (markdown.to_markdown(comparison), export.to_html(comparison)):
        assert "Compared across different devices" in text and "NVIDIA L4" in text
    rows = csv_export.to_csv(comparison).splitlines()
    head = rows[0].split(",")
    assert "NVIDIA L4" in rows[2] and "gpu-2" in rows[2] and head.index("host") == head.index("device") + 1
    assert document.loads(document.dumps(comparison)) == comparison, (
        "a column's environment is lost in the document"
    )


def test_ratios_between_them_are_marked_and_no_others():
    metric = METRICS["decode_tok_s"]
    for hosts, marked in ((UNLIKE, True), (ALIKE, False), ({}, False)):
        comparison = placed(**hosts)
        cell = next(c for c in comparison.cells if c.variant == "nf4" and c.adapter is None)
        assert (devices.MARK in ratios.beside(comparison, cell, metric)) is marked, hosts
        assert bool(devices.unlike(comparison.cells)) is marked
        page = page_summary.render(Live.of(comparison))
        assert ("Compared across different devices" in page) is marked
        assert (devices.MARK in page) is marked
        assert (devices.MARK in latency.figures_table(comparison)) is marked


def test_the_page_shows_the_nodes_and_who_holds_what():
    from comparator.core.result import ErrorInfo
    from comparator.core.state import DeviceState, EngineState, NodeState, Resident

    state = EngineState(
        "Ray cluster, 3 nodes", 200 * 10**9, 100 * 10**9, ready=True,
        residents=(Resident("h", "some/<model>", "nf4", 5 * 10**9, "NVIDIA H200", node="gpu-1"),),
        nodes=(
            NodeState("gpu-1", (DeviceState("NVIDIA H200", 150 * 10**9, 60 * 10**9),)),
            NodeState("gpu-2", (DeviceState("NVIDIA H200", 150 * 10**9, 40 * 10**9),)),
            NodeState("<b>", (), "other versions (torch 2.12.0 there, 2.13.0 here)"),
        ),
    )  # fmt: skip
    line, held = header.render(state), residents.render(state)
    assert "2 devices" in line and "100.0 GB free" in line and "1 node refused" in line
    first, second = held.split("gpu-2")
    assert "nf4" in first and "60.0 of 150 GB free" in first and "nf4" not in second
    assert "torch 2.12.0 there" in second and "<b><b>" not in held and "&lt;b&gt;" in held
    lost = EngineState("Ray cluster", None, None, problem=ErrorInfo("No Ray <cluster>.", "Start one."))
    assert (
        cluster.shown(lost) and "Start one." in header.render(lost) and "<cluster>" not in header.render(lost)
    )
    assert not cluster.shown(EngineState("cpu", 1, 1, ready=True)), (
        "without a cluster the page stays as it was"
    )
