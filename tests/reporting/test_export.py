"""Reports: every figure arrives, what was not measured is not 0, and texts stay data in each format."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import sample
from fault_layer import failing

from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import CellResult, Environment, ErrorInfo, RunFigures
from comparator.core.variant import CellName
from comparator.metrics.definitions import METRICS
from comparator.reporting import csv_export, export, markdown, ratios, summary
from comparator.util import formatting

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> | `code` **bold** [a](javascript:alert(1)) =1+1"
)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def everywhere(text: str):
    """The sample with `text` in every place that may hold one."""

    def fill(value):
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        return (
            [fill(v) for v in value] if isinstance(value, list) else text if isinstance(value, str) else value
        )

    whole = sample.comparison()
    raw = json.loads(document.dumps(whole))
    filled = fill(raw)
    # What has a grammar of its own stays.
    filled |= {"id": raw["id"], "created_at": raw["created_at"]}
    for new, old in zip(filled["cells"], raw["cells"], strict=True):
        new |= {"status": old["status"], "finish_reason": old["finish_reason"]}
    filled["environment"]["packages"] = {text: text}
    return document.loads(json.dumps(filled))


# ---------------------------------------------------------------- figures


def test_a_ratio_is_the_column_over_the_reference():
    comparison = sample.comparison()
    resident = METRICS["resident_bytes"]
    assert ratios.ratio(comparison, sample.NF4, resident) == pytest.approx(113149312 / 269031424)
    assert ratios.ratio(comparison, sample.REFERENCE, resident) is None, (
        "the reference beside itself says nothing"
    )
    assert ratios.ratio(comparison, sample.FAILED, resident) is None


def test_a_column_with_an_adapter_stands_beside_the_reference_with_the_same_adapter():
    adapted = replace(sample.REFERENCE, adapter="pirate*0.5")
    comparison = sample.comparison(cells=(sample.REFERENCE, adapted, sample.NF4, sample.ADAPTED))
    assert ratios.reference_of(comparison, sample.ADAPTED) == adapted
    assert ratios.reference_of(comparison, sample.NF4) == sample.REFERENCE
    assert ratios.reference_of(comparison, adapted) == sample.REFERENCE
    assert ratios.reference_of(sample.comparison(), sample.ADAPTED) == sample.REFERENCE, (
        "none has the adapter"
    )
    assert ratios.reference_of(sample.comparison(reference=None), sample.NF4) is None
    assert ratios.reference_of(sample.comparison(reference=CellName("gone")), sample.NF4) is None


def test_a_ratio_that_the_runs_do_not_carry_is_in_parentheses():
    decode = METRICS["decode_tok_s"]
    comparison = sample.comparison()
    assert ratios.beside(comparison, sample.NF4, decode) == "(×0.95)", "14.2 … 15.1 overlaps 14.9 … 15.2"
    slow = tuple(RunFigures(0.3, v) for v in (7.0, 7.1, 7.2))
    slower = replace(sample.NF4, latency=replace(sample.NF4.latency, decode_tok_s=7.1, runs=slow))
    comparison = sample.comparison(cells=(sample.REFERENCE, slower))
    assert ratios.beside(comparison, slower, decode) == "×0.47"


def test_stored_as_says_what_uint8_means():
    assert "1 × nf4 in uint8 (Linear4bit): 0.47 MB, 4.25 bits per weight" in summary.stored_as(sample.NF4)
    assert len(summary.stored_as(sample.NF4)) == 2, "the tied head is not stored a second time"


# ---------------------------------------------------------------- JSON and CSV


def test_json_is_the_document():
    assert document.loads(export.to_json(sample.comparison())) == sample.comparison()


def test_csv_has_a_row_a_column_and_every_figure():
    found = rows(csv_export.to_csv(sample.comparison()))
    assert [(r["variant"], r["adapter"]) for r in found] == [
        ("bf16", ""), ("nf4", ""), ("nf4", "pirate*0.5"), ("int8:threshold=0", ""),
    ]  # fmt: skip
    bf16, nf4, _, failed = found
    assert float(nf4["decode_tok_s"]) == 14.4
    assert float(nf4["decode_tok_s_ratio"]) == pytest.approx(14.4 / 15.08)
    assert int(nf4["quant_state_bytes"]) == 3330000
    assert float(nf4["text_kl_mean"]) == 0.321
    assert bf16["quant_state_bytes"] == "0", "0 that was measured is 0"
    assert bf16["prepare_s"] == "", "what was not measured is empty, never 0"
    assert bf16["reference"] == "yes" and nf4["reference"] == "no"
    assert failed["status"] == "failed" and failed["advice"] == "Unload nf4 (113 MB)."
    assert not any(failed[f.key] for f in METRICS.values()), "a failed column has no figures"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "＝"])
def test_a_text_that_a_spreadsheet_would_run_is_neutralised(start):
    dangerous = f"{start}HYPERLINK(1)"
    found = rows(csv_export.to_csv(everywhere(dangerous)))
    columns = [
        r[name]
        for r in found
        for name in ("variant", "notes", "text", "problem", "model", "kernel", "device")
    ]
    assert dangerous in [c[1:] for c in columns], "the text is missing, so this checks nothing"
    assert not [c for c in columns if re.match(r"\s*[=+\-@＝]", c)], "Excel would run this"


def test_negative_numbers_stay_numbers():
    cell = replace(sample.NF4, latency=replace(sample.NF4.latency, load_s=-0.25))
    assert rows(csv_export.to_csv(sample.comparison(cells=(cell,))))[0]["load_s"] == "-0.25"


def test_csv_survives_line_breaks_quotes_and_nul():
    text = 'a "quoted", line\nand\r\nanother\0 한국어'
    found = rows(csv_export.to_csv(sample.comparison(cells=(replace(sample.NF4, text=text),))))
    assert found[0]["text"].replace("\r\n", "\n") == text.replace("\0", "�").replace("\r\n", "\n")


def test_layers_csv_has_a_row_a_tensor():
    found = rows(csv_export.to_layers_csv(sample.comparison()))
    assert len(found) == 9
    packed = found[4]
    assert (packed["variant"], packed["storage_dtype"], packed["logical_dtype"]) == ("nf4", "uint8", "nf4")
    assert (packed["shape"], packed["storage_shape"], packed["loaded_storage_shape"]) == (
        "1536x576",
        "1536x288",
        "442368x1",
    )
    assert found[5]["tied_to"] == "model.embed_tokens.weight" and found[5]["bytes"] == "0"
    assert found[3]["loaded_bytes"] == "", "a layer that was not repacked has no second figure"


def test_layers_can_be_searched():
    assert [r["name"] for r in rows(csv_export.to_layers_csv(sample.comparison(), "LINEAR4BIT nf4"))] == [
        "model.layers.0.mlp.up_proj.weight"
    ] * 2
    assert json.loads(csv_export.to_layers_json(sample.comparison(), "embed"))[0]["shape"] == [49152, 576]
    assert rows(csv_export.to_layers_csv(sample.comparison(), "nothing like it")) == []


# ---------------------------------------------------------------- Markdown


def test_markdown_has_tables_answers_and_problems():
    text = markdown.to_markdown(sample.comparison())
    assert "| nf4 | 14.4 (×0.95) | 300 ×1.41 | 113 ×0.42 |" in text
    assert "The city of Paris is the capital of France." in text
    assert "**int8 does not fit: it needs 163 MB, 120 MB are free.** Unload nf4 (113 MB)." in text
    line = next(line for line in text.splitlines() if line.startswith("| int8:threshold=0 (failed) |"))
    assert set(re.findall(r"\| ([^|]+) (?=\|)", line)[1:]) == {formatting.NONE}
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"\|", table[0])) for line in table[:6])


def test_markdown_cannot_be_broken_by_a_text():
    text = markdown.to_markdown(everywhere(HOSTILE))
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "alert(1)" in outside
    for dangerous in ("<script>", "<img", "[a](", "**bold**", "| `code`"):
        assert not re.search(rf"(?<!\\){re.escape(dangerous)}", outside), (
            f"{dangerous} would be taken for Markdown"
        )
    fence = "````\n```\nno end\n`````"
    assert f"``````text\n{fence}\n``````" in markdown.to_markdown(
        sample.comparison(cells=(replace(sample.NF4, text=fence),))
    )


def test_the_verdict_stands_in_markdown_and_html_with_its_rule():
    from comparator.fidelity import verdict

    rows = {row[0]: row for row in summary.verdict_rows(sample.comparison())}
    assert rows["bf16"][-1] == "reference" and rows["int8:threshold=0"][-1] == "failed"
    assert rows["nf4"][1:3] == ("58 % less", "(×0.95)"), "the runs overlap"
    assert "0.32 ± 0.009" in rows["nf4"] and "72.8 ± 0.98 %" in rows["nf4"]
    for text in (markdown.to_markdown(sample.comparison()), export.to_html(sample.comparison())):
        assert "0.32 ± 0.009" in text and "twice its standard error" in text
    without = sample.comparison(cells=(sample.REFERENCE,))
    assert summary.verdict_rows(without) == [] and "Verdict" not in markdown.to_markdown(without)
    assert verdict.RULE


# ---------------------------------------------------------------- HTML


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)


def test_html_is_self_contained_and_complete():
    text = export.to_html(sample.comparison())
    page = _Page(text)
    fetched = [a[k] for _, a in page.tags for k in ("src", "href", "srcset", "action") if k in a]
    assert not fetched, f"the page would fetch {fetched}"
    assert "@import" not in text.split("</style>")[0] and "url(" not in text.split("</style>")[0]
    said = " ".join(page.words)
    for expected in ("14.4", "×0.42", "(×0.95)", "The city of Paris", "it needs 163 MB", "Be brief.", "Linear4bit",
                     "1536 × 288", "loaded as uint8 442368 × 1", "bnb_4bit_quant_type", "2.13.0+cpu"):  # fmt: skip
        assert expected in said, f"{expected} is missing"
    assert text.count("plotly.js v") == 1, "plotly.js is embedded once"
    assert sum("data-figure" in a for _, a in page.tags) == 7, (
        "time, gaps, memory, two of fidelity, weight errors of two columns"
    )


def test_html_escapes_every_text():
    plain, hostile = _Page(export.to_html(sample.comparison())), _Page(export.to_html(everywhere(HOSTILE)))
    assert "<script>alert(1)</script>" in " ".join(hostile.words), (
        "the text is missing, so this checks nothing"
    )
    count = {tag: sum(t == tag for t, _ in plain.tags) for tag in ("script", "img", "a", "iframe")}
    found = {tag: sum(t == tag for t, _ in hostile.tags) for tag in count}
    assert found["img"] == found["a"] == found["iframe"] == 0
    assert found["script"] <= count["script"], "a text became a script"
    assert not any(name.startswith("on") for _, attrs in hostile.tags for name in attrs)


@pytest.mark.browser
@pytest.mark.parametrize("make", [sample.comparison, lambda: everywhere(HOSTILE)], ids=["sample", "hostile"])
def test_html_in_a_real_browser(make, tmp_path, browser):
    """Opened from the disk with the network off: plots are drawn, nothing is blocked, no text runs."""
    path = export.write(make(), tmp_path / "report.html")
    with browser.new_context(offline=True, viewport={"width": 390, "height": 800}) as context:
        page = context.new_page()
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: (messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        drawn = page.locator(".plot .js-plotly-plot").count()
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert messages == [], f"the console says {messages}"
    assert drawn >= 5
    assert wide <= 0, f"the page scrolls sideways by {wide} px on a phone"


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.layers.csv", "a.md", "a.html", "B.JSON"])
def test_the_ending_says_the_kind(name, tmp_path):
    path = export.write(sample.comparison(), tmp_path / name)
    assert path.read_text(encoding="utf-8") == export.render(sample.comparison(), name)
    assert [p.name for p in tmp_path.iterdir()] == [name], "a temporary file is left"


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(UserError, match="no file ending of a known format"):
        export.check_name(tmp_path / "a.docx")
    with pytest.raises(UserError, match="no folder"):
        export.check_name(tmp_path / "missing" / "a.json")
    with pytest.raises(UserError, match="cannot be written"):
        export.write(sample.comparison(), tmp_path / "missing" / "a.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export.check_name(tmp_path / "folder.json")


def test_what_stood_there_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with failing(tmp_path, 3, errno.ENOSPC), pytest.raises(UserError, match="No space left"):
        export.write(sample.comparison(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_empty_comparison_can_be_reported():
    """All columns failed before anything was known."""
    failed = CellResult("nf4", status="failed", error=ErrorInfo("It broke.", "Mend it."))
    comparison = sample.comparison(cells=(failed,), reference=CellName("nf4"), environment=Environment())
    for name in export.FORMATS:
        assert "nf4" in export.render(comparison, f"x{name}") or name in (".layers.csv", ".prompts.csv")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a;=1+cmd", "a;'=1+cmd"),
        ('a; "@SUM(1)', "a;' \"@SUM(1)"),
        ("one\n=2", "one\n'=2"),
        ("=1;+2", "'=1;'+2"),
        ("a;b - c\nd", "a;b - c\nd"),
    ],
)
def test_a_formula_behind_a_semicolon_or_a_line_end_is_neutralised(text, written):
    assert written in [r["text"] for r in rows(csv_export.to_csv(everywhere(text)))]


def test_threads_that_write_reports_leave_modes_and_umask_alone(tmp_path):
    old = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: export.write_text(tmp_path / f"{n}.md", "x"), range(300)))
        now = os.umask(0o027)
    finally:
        os.umask(old)
    assert now == 0o027, "writing a report changed the umask of the process"
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}, (
        "two threads changed the umask at once"
    )
