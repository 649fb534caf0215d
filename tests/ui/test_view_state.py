"""Events → what the columns show."""

from __future__ import annotations

import pytest
import sample

from comparator.backends import resolve
from comparator.core.events import Chunk, Failed, Finished, Generated, Generating, Loading, Queued, Scoring
from comparator.core.result import CellResult, ErrorInfo, Latency, RunFigures
from comparator.core.variant import Cell, parse_adapter
from comparator.ui import handlers
from comparator.ui.results import cards, summary
from comparator.ui.view_state import Live

BF16, NF4 = Cell(resolve("bf16")), Cell(resolve("nf4"))


def result(cell: Cell, text: str = "two words", **rest) -> CellResult:
    return CellResult(cell.variant.notation, text=text, token_ids=(1, 2), **rest)


def test_a_column_from_waiting_to_done():
    live = Live((BF16, NF4))
    assert [c.state for c in live.columns] == ["queued", "queued"]
    live.apply(Queued(2))
    assert live.ahead == 2
    live.apply(Loading(BF16, 0.4, "reading weights"))
    assert live.ahead == 0 and live.columns[0].fraction == 0.4 and live.current is live.columns[0]
    assert live.apply(Generating(BF16, Chunk("two", (1,), (10.0,)))) == {0}, (
        "only the card that changed is drawn"
    )
    live.apply(Generating(BF16, Chunk(" words", (2, 3), (10.25, 10.5))))
    assert live.columns[0].text == "two words" and live.columns[0].speed_so_far == 4.0
    assert live.apply(Generated(BF16, result(BF16))) == {0, 1}, "the reference's figures change every ratio"
    assert live.columns[0].state == "answered" and live.columns[1].state == "queued"
    live.apply(Scoring(BF16, 0.5, "scoring"))
    assert live.columns[0].state == "scoring" and live.columns[0].answered, (
        "the text stays whole while it is scored"
    )
    live.apply(Finished(BF16, result(BF16)))
    assert live.columns[0].state == "done" and live.columns[0].settled
    live.apply(Loading(BF16, None, "late"))
    assert live.columns[0].state == "done", "nothing unsettles a settled column"


def test_only_the_first_round_is_shown():
    live = Live((BF16,))
    live.apply(Generating(BF16, Chunk("once", (1,), (1.0,))))
    live.apply(Generated(BF16, result(BF16, "once")))
    live.apply(Generating(BF16, Chunk("once", (1,), (2.0,)), 1, 2))
    assert live.columns[0].text == "once" and live.columns[0].message == "run 2 of 2"


def test_a_failure_is_that_columns_alone():
    live = Live((BF16, NF4))
    broken = result(NF4, "", status="failed", error=ErrorInfo("No room.", "Unload bf16."))
    live.apply(Failed(NF4, "No room.", "Unload bf16.", broken))
    assert [c.state for c in live.columns] == ["queued", "failed"]


def test_the_reference_is_the_most_precise_unless_chosen():
    assert Live((NF4, BF16)).reference.variant == "bf16"
    assert Live((NF4, BF16), reference=NF4).reference.variant == "nf4"


def test_a_column_with_an_adapter_stands_beside_the_reference_with_the_same_one():
    live = Live.of(sample.comparison())
    plain, nf4, with_adapter, failed = live.columns
    assert live.is_reference(plain) and live.against(plain) is None
    assert live.against(nf4) is plain
    assert live.against(with_adapter) is plain, "no reference with that adapter here, so the plain one"
    assert failed.state == "failed" and live.comparison is not None


def test_a_saved_comparison_looks_like_one_that_just_ended():
    comparison = sample.comparison()
    live = Live.of(comparison)
    assert [c.label for c in live.columns] == [c.label for c in comparison.cells]
    assert all(c.settled for c in live.columns)


def test_figures_of_no_time_at_all_are_not_invented():
    live = Live((BF16,))
    live.apply(Generating(BF16, Chunk("a", (1,), (5.0,))))
    assert live.columns[0].speed_so_far is None
    live.apply(Generating(BF16, Chunk("", (), ())))
    live.apply(Generating(BF16, Chunk("b", (2,), (5.0,))))
    assert live.columns[0].speed_so_far is None
    assert Latency(runs=(RunFigures(),)).decode_tok_s is None


@pytest.mark.parametrize("chosen", range(4))
def test_every_state_of_a_run_can_be_drawn(chosen: int):
    """Whichever column is the reference: it may come after columns that are measured against it."""
    whole = sample.comparison()
    cells = [Cell(resolve(c.variant), parse_adapter(c.adapter) if c.adapter else None) for c in whole.cells]
    live = Live(tuple(cells), reference=cells[chosen])

    def draw() -> None:
        assert summary.render(live)
        assert all(cards.render(live, column, at, {}) for at, column in enumerate(live.columns))

    draw()
    for cell, measured in zip(cells, whole.cells, strict=True):
        live.apply(Loading(cell, 0.5, "reading weights"))
        draw()
        if measured.status == "ok":
            live.apply(Generating(cell, Chunk("two", (1,), (10.0,))))
            draw()
            live.apply(Generated(cell, measured))
            draw()
            live.apply(Finished(cell, measured))
        else:
            live.apply(Failed(cell, "No room.", "Unload bf16.", measured))
        draw()


def test_the_tabs_are_drawn_where_nothing_is_timed():
    """While the next column loads, and after each score; not while an answer or its repeats are timed."""
    live = Live((BF16, NF4))

    def drawn(*events) -> bool:
        for event in events:
            live.apply(event)
        return handlers._tabs_may_draw(live, list(events))

    assert not drawn(Loading(BF16, 0.5, ""))
    assert drawn(Generated(BF16, result(BF16)))
    assert not drawn(Generating(NF4, Chunk("two", (1,), (10.0,))))
    assert not drawn(Generated(NF4, result(NF4))), "the first repeat may follow at once"
    assert not drawn(Generating(BF16, Chunk("two", (1,), (10.0,)), 1, 2))
    assert drawn(Scoring(BF16, 0.0, "")) and not drawn(Scoring(BF16, 0.5, ""))
    assert drawn(Finished(BF16, result(BF16)))
