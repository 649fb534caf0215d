"""A comparison as one self-contained HTML page: readable offline, on paper, in the light and in the dark.

Every text goes through `html.escape`, and a content security policy that names our scripts by their hash keeps
any other from running, should one get in. Knows nothing of a server or of torch.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from comparator import figures, report, verdict, words
from comparator.types import CellResult, Comparison, LayerRow

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_CSS = """
:root { color-scheme: light dark; --ink: #1a1d21; --soft: #5b636e; --line: #d9dde3; --page: #ffffff;
  --card: #f6f7f9; --bad: #a3221b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3abb6; --line: #363c45;
  --page: #15181c; --card: #1e2228; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 "IBM Plex Sans", system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font: 600 1rem/1.4 "IBM Plex Mono", ui-monospace, monospace; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); } .bad { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 1rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .75rem; margin: .5rem 0; font: .9rem/1.5 "IBM Plex Mono", ui-monospace, monospace; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .92rem; } th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; vertical-align: top; } th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; }
td:first-child, .mono { font-family: "IBM Plex Mono", ui-monospace, monospace; }
td small { color: var(--soft); display: block; } .cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.card { border: 1px solid var(--line); border-top: 4px solid var(--edge); border-radius: .5rem; padding: .9rem 1rem;
  break-inside: avoid; } .card ul { margin: .5rem 0 0; padding-left: 1.1rem; font-size: .9rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; } details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; } .plot { break-inside: avoid; margin: 1rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } details > pre { display: none; }
  a { color: inherit; } h2 { break-after: avoid; } .scroll { overflow: visible; } table { font-size: 8pt; }
  th, td { padding: .15rem .3rem; } .layers { display: none; } }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""

_DRAW = """
for (const place of document.querySelectorAll(".plot > div")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  Plotly.newPlot(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
}
"""


def page(comparison: Comparison) -> str:
    """The whole page. Plots are left out where plotly is not installed; everything else stays."""
    plots, scripts = _plots(comparison)
    title = f"{comparison.model}: {', '.join(cell.label for cell in comparison.cells)}"
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            '<p class="soft">A recording of one comparison: every figure was measured in that run on that machine, '
            "– was not measured. MB is 10⁶ bytes, × is the ratio to the reference.</p>",
            _facts(report.headline(comparison)),
            _prompt(comparison),
            "<h2>Comparison</h2>",
            _figures(comparison, figures.KEY),
            _verdicts(comparison),
            "<h2>Answers</h2>",
            f'<div class="cards">{"".join(_card(comparison, cell) for cell in comparison.cells)}</div>',
            plots,
            "<h2>Latency</h2>",
            _figures(comparison, figures.LATENCY),
            "<h2>Memory</h2>",
            _figures(comparison, figures.MEMORY),
            _layers(comparison),
            _code(comparison),
            _definitions(comparison),
        ]
    )
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; script-src {allowed}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n"
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs if v != words.NONE)
        + "</dl>"
    )


def _prompt(comparison: Comparison) -> str:
    system = comparison.prompt.system
    return (f"<h2>System prompt</h2><pre>{escape(system)}</pre>" if system else "") + (
        f"<h2>Prompt</h2><pre>{escape(comparison.prompt.text)}</pre>"
    )


def _figures(comparison: Comparison, keys: tuple[str, ...]) -> str:
    shown = figures.present(comparison, keys)
    head = "".join(
        f'<th scope="col" title="{escape(f.help)}">{escape(f.title)}<br>{escape(f.unit)}</th>' for f in shown
    )
    rows = []
    for cell in comparison.cells:
        mark = " <small>reference</small>" if figures.is_reference(comparison.reference, cell) else ""
        mark += f" <small>{cell.status}</small>" if cell.status != "ok" else ""
        values = ""
        for figure in shown:
            beside = figures.beside(comparison, cell, figure)
            values += f"<td>{figure.written(cell)}{f'<small>{escape(beside)}</small>' if beside else ''}</td>"
        rows.append(f"<tr><td>{escape(cell.label)}{mark}</td>{values}</tr>")
    return _table(f'<th scope="col">column</th>{head}', rows)


def _table(head: str, rows: Iterable[str], kind: str = "") -> str:
    return (
        f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _card(comparison: Comparison, cell: CellResult) -> str:
    from comparator.plots import comparison_colours

    said = ""
    if cell.error:
        said += f'<p><span class="bad">{escape(cell.error.problem)}</span> {escape(cell.error.advice)}</p>'
    if cell.text:
        said += f'<p class="answer">{escape(cell.text)}</p>'
    points = (
        [f"multiplied by {cell.kernel}, decode path {cell.decode_path or words.NONE}"] if cell.kernel else []
    )
    points += [*cell.notes, *figures.stored_as(cell)]
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return (
        f'<article class="card" style="--edge: {comparison_colours(comparison)[cell.variant]}">'
        f'<h3>{escape(cell.label)}</h3><p class="soft">{escape(report.state_of(cell))}</p>{said}'
        f"{f'<ul>{items}</ul>' if items else ''}</article>"
    )


_LAYER_HEAD = ("name", "module", "means", "stored as", "multiplies in", "shape", "stored shape", "bytes", "quant state",
               "bits/weight", "device", "note")  # fmt: skip


def _layers(comparison: Comparison) -> str:
    tables = []
    for cell in comparison.cells:
        if cell.layers:
            head = "".join(f'<th scope="col">{name}</th>' for name in _LAYER_HEAD)
            table = _table(head, (_layer(row) for row in cell.layers), "layers")
            summary = f"{escape(cell.label)}: {words.plural(len(cell.layers), 'stored tensor')}"
            tables.append(f"<details><summary>{summary}</summary>{table}</details>")
    return f"<h2>Layers</h2>{''.join(tables)}" if tables else ""


def _layer(row: LayerRow) -> str:
    note = [f"shares its bytes with {row.tied_to}"] if row.tied_to else []
    note += [f"adapter of rank {row.adapter_rank}"] if row.adapter_rank else []
    if row.loaded:
        note.append(f"loaded as {row.loaded.storage_dtype} {_shape(row.loaded.storage_shape)}")
    values = (row.module_class, row.logical_dtype, row.storage_dtype, row.compute_dtype, _shape(row.shape),
              _shape(row.storage_shape), words.count(row.bytes), words.count(row.quant_state_bytes),
              words.figure(row.bits_per_weight), row.device)  # fmt: skip
    cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
    return f'<tr><td>{escape(row.name)}</td>{cells}<td class="text">{escape("; ".join(note))}</td></tr>'


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _code(comparison: Comparison) -> str:
    """The code of every column that worked. A document from elsewhere may name methods that are not known here."""
    from comparator.code import snippet
    from comparator.types import Problem

    blocks = []
    for cell in comparison.cells:
        if cell.status != "failed":
            try:
                code = snippet(cell, comparison)
            except Problem as problem:
                code = f"# {problem}"
            blocks.append(
                f"<details><summary>{escape(cell.label)}</summary><pre>{escape(code)}</pre></details>"
            )
    return f"<h2>Use this column</h2>{''.join(blocks)}" if blocks else ""


def _definitions(comparison: Comparison) -> str:
    shown = figures.present(comparison, tuple(figures.BY_KEY))
    return "<h2>What the figures are</h2>" + _facts((f.title, f.help) for f in shown)


def _verdicts(comparison: Comparison) -> str:
    """What can be said of each column, and the rule by which it is said."""
    found = report.verdict_rows(comparison)
    if not found:
        return ""
    rows = [f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>" for row in found]
    head = "".join(f'<th scope="col">{name}</th>' for name in report.VERDICT_HEAD)
    return f'<h2>Verdict</h2>{_table(head, rows)}<p class="soft">{escape(verdict.RULE)}</p>'


def _drawn(comparison: Comparison) -> Iterable[tuple[Figure, str, str]]:
    """(figure, heading, caption) of every plot that has something to show."""
    from comparator import plots, plots_fidelity

    yield (
        plots.token_timeline(comparison),
        "Tokens over time",
        ("Where a line starts is the time to the first token, its slope the speed."),
    )
    yield (
        plots.inter_token_box(comparison),
        "Time between tokens",
        ("Each box spans half of the tokens, the line in it is the median."),
    )
    yield (
        plots.memory_bars(comparison),
        "Memory",
        ("What each column holds; the diamond marks the highest use while it ran."),
    )
    if any(figures.BY_KEY["prompt_kl_mean"].get(cell) for cell in comparison.cells):
        yield (
            plots_fidelity.kl_by_token(comparison),
            "Divergence by token",
            ("KL divergence from the reference at each token of its own answer."),
        )
        yield (
            plots_fidelity.trade_off(comparison),
            "Memory against divergence",
            ("Left and down is better; the line joins the columns that no other beats in both."),
        )
    for cell in comparison.cells:
        if any(row.error for row in cell.layers):
            yield (
                plots_fidelity.layer_map(cell),
                f"Weight error of {cell.label}",
                ("How far each layer's weights are from the reference's: relative Frobenius error."),
            )


def _plots(comparison: Comparison) -> tuple[str, list[str]]:
    """(the places for the plots with their data, the scripts that draw them)."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        return (
            '<p class="soft">plotly is not installed where this was written, so there are no plots.</p>',
            [],
        )
    parts = []
    for number, (figure, heading, caption) in enumerate(_drawn(comparison)):
        if not figure.data:
            continue
        data = figure.to_json().replace("<", "\\u003c")
        parts.append(
            f'<section class="plot"><h2>{escape(heading)}</h2><p class="soft">{escape(caption)}</p>'
            f'<div data-figure="figure-{number}"></div>'
            f'<script type="application/json" id="figure-{number}">{data}</script></section>'
        )
    return ("".join(parts), [get_plotlyjs(), _DRAW]) if parts else ("", [])
