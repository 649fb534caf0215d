"""The table of metrics: complete, in the README, and enough: a new metric is one entry and the line that measures it."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import fields, replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import sample

from comparator.cli import tables
from comparator.core import document
from comparator.core.result import CellResult, Comparison, Energy, Latency, Memory
from comparator.metrics import definitions, latency
from comparator.metrics.definitions import METRICS, Metric
from comparator.reporting import csv_export, export, markdown, ratios
from comparator.reporting.plots import matrix
from comparator.ui.results import summary
from comparator.ui.tabs import latency as latency_tab
from comparator.ui.tabs import memory as memory_tab
from comparator.ui.view_state import Live
from comparator.util import formatting

ROOT = Path(__file__).resolve().parents[2]
TOY = Metric(
    "toy_s", "toy latency", "ms", "A value of this test.", "lower", ("key", "summary", "latency", "matrix")
)


@pytest.fixture
def toy(monkeypatch) -> Metric:
    """A latency metric that only this test knows."""
    monkeypatch.setitem(METRICS, TOY.key, TOY)
    return TOY


def measured(key: str, first: tuple[float, ...], second: tuple[float, ...]) -> Comparison:
    """A comparison of two columns whose runs measured these values of the metric `key`."""

    def cell(name: str, values: tuple[float, ...]) -> CellResult:
        runs = [latency.record(latency.from_timestamps(0, [1, 1.1, 1.2], 4), **{key: v}) for v in values]
        return replace(sample.comparison().cell(name), latency=latency.aggregate(runs))

    return sample.comparison(cells=(cell("bf16", first), cell("nf4", second)))


def test_every_number_that_is_measured_has_an_entry():
    for part in (Latency, Memory, Energy):
        numbers = {f.name for f in fields(part) if f.type in ("float | None", "int | None")}
        assert numbers, f"no numeric field of {part.__name__} was recognized, so this checks nothing"
        assert numbers <= set(METRICS), (
            f"{part.__name__} has fields without a metric: {numbers - set(METRICS)}"
        )


def test_the_readme_defines_every_metric_and_no_other():
    table = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("## What it measures")[2]
        .partition("\n- ")[0]
    )
    expected = [
        f"| {m.title} | {m.unit or formatting.NONE} | {m.better or formatting.NONE} | {m.description} |"
        for m in METRICS.values()
    ]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "| unit |" not in line]
    assert rows == expected, "the README's table differs from comparator/metrics/definitions.py"


def test_every_entry_says_something_of_its_own():
    for key, metric in METRICS.items():
        assert metric.key == key and metric.title and metric.description
    titles = [m.title for m in METRICS.values()]
    assert len(set(titles)) == len(titles), "two metrics share a title"


def test_a_metric_of_the_table_alone_is_shown_everywhere(toy):
    comparison = measured("toy_s", (0.002, 0.004, 0.009), (0.010, 0.008, 0.030))
    for cell, median in zip(comparison.cells, (0.004, 0.010), strict=True):
        assert toy.get(cell) == median, "repeats are not aggregated as the entry says"
        assert len(definitions.run_values(cell, "toy_s")) == 3, "a run's own value is lost"
    again = document.loads(document.dumps(comparison))
    assert again == comparison, "the document does not hold the metric"
    nf4 = again.cell("nf4")
    assert ratios.ratio(again, nf4, toy) == pytest.approx(2.5)
    assert ratios.carried(again, nf4, toy) is False, "8 to 30 ms overlaps 2 to 9 ms"

    head, units, _, reference, row, *_ = tables.comparison_table(again).splitlines()
    assert "toy latency" in head and "ms ↓" in units and "4.00" in reference and "10.0 (×2.50)" in row
    rows = list(csv.DictReader(io.StringIO(csv_export.to_csv(again))))
    assert [r["toy_s"] for r in rows] == ["0.004", "0.01"] and rows[1]["toy_s_ratio"] == "2.5"
    text = markdown.to_markdown(again)
    assert text.count("toy latency (ms ↓)") == 2, "once among the key metrics, once below Latency"
    assert "10.0 (×2.50)" in text
    html = unescape(export.to_html(again))
    assert "toy latency" in html and toy.description in html and "(×2.50)" in html
    for page in (latency_tab.figures_table(again), summary.render(Live.of(again))):
        assert "Toy latency, ms ↓" in page and "A value of this test. Lower is better." in page
        assert "10.0" in page and "×2.50" in page
    assert "(8.00 to 30.0)" in latency_tab.figures_table(again), "the range of the repeats"
    assert ("toy latency, ms ↓", "toy_s") in matrix.choices(again)
    assert matrix.table(again, "toy_s")[1] == [["bf16", "4.00"], ["nf4", "10.0"]]


def test_a_metric_that_no_column_has_is_shown_nowhere(toy):
    comparison = sample.comparison()
    for text in (
        tables.comparison_table(comparison),
        markdown.to_markdown(comparison),
        export.to_html(comparison),
        latency_tab.figures_table(comparison),
    ):
        assert "oy latency" not in text


def test_a_value_without_an_entry_is_refused():
    with pytest.raises(KeyError, match="ttfts_s"):
        latency.record(Latency(), ttfts_s=1.0)


def test_no_value_of_one_run_passes_for_the_column():
    """Every number of `Latency`: the median or what its entry says, None where no run measures it."""
    numbers = [m.key for m in METRICS.values() if m.of_latency]
    runs = [
        Latency(decode_tok_s=rate, **{k: rate * 2 for k in numbers if k != "decode_tok_s"})
        for rate in (3, 1, 8)
    ]
    together = latency.aggregate(runs)
    for key in numbers:
        expected = {"median": 6, "representative": 6, "max": 16, "first": 6, None: None}[
            METRICS[key].over_repeats
        ]
        assert getattr(together, key) == (3 if key == "decode_tok_s" else expected), key


def test_energy_and_adapters_are_in_the_latency_tab():
    page = latency_tab.figures_table(sample.comparison())
    for heading, value in (
        ("Energy, J/token ↓", "0.75"),
        ("Adapter load, s ↓", "0.12"),
        ("Adapter switch, ms ↓", "4.00"),
    ):
        assert heading in page and value in page, f"{heading} is missing on the page"
    without = sample.comparison(cells=(sample.REFERENCE,))
    assert "Energy" not in latency_tab.figures_table(without), "a column of dashes where no GPU reports it"
    assert "Weights + quant state, MB ↓" in memory_tab.figures_table(without)


def test_bits_per_weight_counts_a_tied_tensor_once():
    total = sample.NF4.memory.weight_bytes + sample.NF4.memory.quant_state_bytes
    bits = METRICS["bits_per_weight"].get
    assert bits(sample.NF4) == pytest.approx(8 * total / (28311552 + 884736)), "the tied head counts once"
    assert bits(CellResult("bf16")) is None


def test_the_example_in_contributing_works(monkeypatch):
    """“Add a figure: one entry”: the entry and the line are taken from the text, and the metric is measured and shown."""
    section = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("## Add a figure")[2]
        .partition("\n## ")[0]
    )
    entry, line = re.findall(r"```python\n(.*?)```", section, re.S)
    metric = eval(entry.strip().removesuffix(","), {"Metric": Metric})
    monkeypatch.setitem(METRICS, metric.key, metric)
    source = (ROOT / "comparator/metrics/latency.py").read_text(encoding="utf-8")
    anchor = "        ttft_s=ttft,\n"
    assert source.count(anchor) == 1, "from_timestamps has changed, so the example has to follow"
    changed = SimpleNamespace(**_run(source.replace(anchor, f"{anchor}        {line.strip()}\n")))

    runs = [changed.from_timestamps(0.0, [0.5, 0.5 + gap, 1.5], 4) for gap in (0.25, 0.5, 0.125)]
    cell = replace(sample.REFERENCE, latency=changed.aggregate(runs))
    comparison = document.loads(document.dumps(sample.comparison(cells=(cell,))))
    assert metric.get(comparison.cells[0]) == 0.25, "the median of three runs"
    for text in (
        tables.comparison_table(comparison, "latency"),
        csv_export.to_csv(comparison),
        markdown.to_markdown(comparison),
        export.to_html(comparison),
    ):
        assert metric.title in text or metric.key in text
    assert metric.description in latency_tab.figures_table(comparison)
    assert changed.from_timestamps(0.0, [1.0], 4).extra == {}, "one token has no gap: not measured, never 0"


def _run(source: str) -> dict:
    names: dict = {"__name__": "changed_latency"}
    exec(compile(source, "changed latency.py", "exec"), names)
    return names
