"""What a card and the verdict table say, and that nothing in them is ever taken for markup."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import sample

from comparator.core import state as core_state
from comparator.core.errors import UserError
from comparator.core.events import Queued
from comparator.core.result import ErrorInfo
from comparator.ui.form import Shown
from comparator.ui.panel import model, residents
from comparator.ui.results import cards, notice, summary
from comparator.ui.tabs import fidelity, latency, layers, memory
from comparator.ui.view_state import Live
from comparator.util import error_log

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>${alert(1)}{{x}}`"


class Tags(HTMLParser):
    """Collects tags and their attributes; complains about what is not closed in order."""

    VOID = ("br", "img", "input", "hr", "meta", "path", "rect")

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.text = set(), set(), [], []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def hostile_comparison():
    """The sample with a script in every string that a stranger's document or a model could fill."""

    def poisoned(value):
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, tuple):
            return tuple(poisoned(v) for v in value)
        if hasattr(value, "__dataclass_fields__"):
            keep = (
                "status",
                "finish_reason",
                "schema",
                "id",
                "variant",
                "logical_dtype",
                "storage_dtype",
                "decode",
            )
            names = [n for n in value.__dataclass_fields__ if n not in keep]
            return replace(value, **{n: poisoned(getattr(value, n)) for n in names})
        return value

    whole = sample.comparison()
    return replace(poisoned(whole), reference=whole.reference, environment=whole.environment)


def everything(comparison) -> list[str]:
    live, shown = Live.of(comparison), Shown(comparison)
    cells = comparison.cells
    return [
        *(cards.render(live, c, n, {c.label: 5_000_000}) for n, c in enumerate(live.columns)),
        summary.render(live),
        notice.render(live, False, 1.0),
        notice.problem(UserError(HOSTILE, HOSTILE)),
        latency.figures_table(comparison),
        memory.figures_table(comparison) + memory.first_use(comparison) + memory.footprint(comparison),
        *(layers.summary(c) + layers.tensor_table(c) for c in cells),
        layers.tensor_table(cells[0], cells[1]),
        model.render(core_state.ModelFacts(HOSTILE, HOSTILE, HOSTILE, 1, HOSTILE, note=HOSTILE)),
        residents.freed_line(1, HOSTILE),
        *([fidelity.show(shown)[0]] if isinstance(fidelity.show(shown)[0], str) else []),
    ]


@pytest.mark.parametrize("comparison", [sample.comparison(), hostile_comparison()], ids=["plain", "hostile"])
def test_no_string_becomes_markup(comparison):
    for html in everything(comparison):
        found = Tags(html)
        assert not found.tags & {"script", "img", "iframe", "object"}, html[:400]
        assert html.count("<svg") == html.count('<figure class="which-chart"><svg'), (
            "an svg that is not our chart"
        )
        assert not {name for name in found.attributes if name.startswith("on")}, html[:400]


def test_hostile_text_is_shown_as_it_is():
    comparison = hostile_comparison()
    live = Live.of(comparison)
    found = Tags(cards.render(live, live.columns[0], 0))
    assert HOSTILE in "".join(found.text), "an answer that looks like markup is still an answer"


def test_every_figure_has_its_ratio_beside_it():
    live = Live.of(sample.comparison())
    html = cards.render(live, live.columns[1], 1)
    for said in ("14.4 tok/s", "×0.95", "300 ms", "1.41× slower", "113 MB", "58 % less"):
        assert said in html, f"{said} is missing"


def test_a_difference_within_the_spread_is_not_called_one():
    live = Live.of(sample.comparison())  # bf16: 14.9 to 15.2 tok/s, nf4: 14.2 to 15.1
    assert '<span class="grey">×0.95</span>' in cards.render(live, live.columns[1], 1)
    words = summary.in_words(live, live.columns[1])
    assert words.startswith("58 % less memory, very different: "), (
        "a speed that the runs do not carry got a word"
    )


def test_a_failed_card_says_what_why_and_what_to_press():
    live = Live.of(sample.comparison())
    html = cards.render(live, live.columns[3], 3)
    what, why, way = (html.index(s) for s in ("could not run", "needs 163 MB", "Unload nf4"))
    assert what < why < way
    assert "data-untick" in html and "data-run" in html and "Traceback" not in html


def test_what_was_not_measured_is_a_dash():
    live = Live.of(sample.comparison())
    table = summary.render(live)
    row = table[table.index("int8:threshold=0") :]
    assert row.count("–") >= 5, "a failed column has no figures, not zeros"
    assert ">0<" not in row


def test_a_card_has_the_same_parts_in_every_state():
    """Otherwise it would change its height while somebody reads it."""
    shapes = set()
    live = Live.of(sample.comparison())
    column = live.columns[1]
    for state in ("queued", "loading", "generating", "scoring", "done", "stopped"):
        column.state = state
        html = cards.render(live, column, 1)
        shapes.add(
            tuple(
                html.count(part)
                for part in ('class="answer"', 'class="length"', "<dl", 'class="actions"', 'class="progress')
            )
        )
    assert len(shapes) == 1


def test_the_place_in_line_is_said():
    live = Live()
    live.apply(Queued(1))
    assert "1 run ahead" in notice.render(live, False, 0)


def test_an_error_without_words_is_still_explained():
    comparison = sample.comparison()
    broken = replace(comparison.cells[3], error=None)
    live = Live.of(replace(comparison, cells=(*comparison.cells[:3], broken)))
    assert "without an error message" in cards.render(live, live.columns[3], 3)
    named = replace(broken, error=ErrorInfo("Out of memory.", ""))
    assert "Out of memory." in cards.render(
        Live.of(replace(comparison, cells=(named,))),
        Live.of(replace(comparison, cells=(named,))).columns[0],
        0,
    )


@pytest.fixture
def failed_card(own_dirs):
    """() → the card of a column that failed with a logged exception."""
    try:
        raise KeyError("<script>alert(1)</script>")
    except KeyError as error:
        report = error_log.record(error, "load nf4")
    comparison = sample.comparison()
    error = ErrorInfo("Could not load nf4.", "Report it.", report.id)
    live = Live.of(
        replace(comparison, cells=(*comparison.cells[:3], replace(comparison.cells[3], error=error)))
    )
    return report, lambda: cards.render(live, live.columns[3], 3)


def test_a_failed_card_says_where_its_traceback_is_and_copies_it(failed_card):
    report, card = failed_card
    html = card()
    assert f"Error {report.id}, logged in {error_log.log_file()}" in html
    assert "data-copy-details" in html and "Traceback" in html and "<script>" not in html


def test_visitors_see_the_errors_id_and_nothing_else_of_it(failed_card, own_dirs, settings_env):
    report, card = failed_card
    settings_env(public=1)
    html = card()
    assert report.id in html
    for private in ("Traceback", "data-copy-details", str(own_dirs), "comparator.log"):
        assert private not in html, f"a visitor of a public page can read {private!r}"


def test_an_error_of_another_installation_has_nothing_to_copy(own_dirs):
    comparison = sample.comparison()
    error = ErrorInfo("Could not load nf4.", "Report it.", "00000000")
    live = Live.of(replace(comparison, cells=(replace(comparison.cells[3], error=error),)), recorded=True)
    html = cards.render(live, live.columns[0], 0)
    assert "Error 00000000" in html and "data-copy-details" not in html and "comparator.log" not in html
