"""The plan of a comparison only moves forward, and its time left comes from what was measured."""

from __future__ import annotations

from dataclasses import replace

from comparator.backends import resolve
from comparator.comparison.pace import Pace
from comparator.comparison.plan import Plan
from comparator.core.events import Answering, Chunk, Finished, Generated, Generating, Loading, Scoring
from comparator.core.prompt_set import PromptSet, SetPrompt
from comparator.core.request import GenerationSettings, Request
from comparator.core.result import CellResult
from comparator.core.variant import Cell

CELLS = tuple(Cell(resolve(name)) for name in ("bf16", "int8", "nf4"))
TOKENS, LOAD_S, TOKEN_S, SCORE_S = 10, 4.0, 0.5, 0.25


def request(repeats: int = 0) -> Request:
    return Request(
        "tiny", CELLS, "Hello", settings=GenerationSettings(max_new_tokens=TOKENS, repeats=repeats)
    )


def run(rounds: int):
    """(seconds, event) of a whole run with three columns, as the runner emits them."""
    now = 100.0
    for number in range(rounds):
        for cell in CELLS:
            yield now, Loading(cell, 0.0, "loading")
            if number == 0:
                yield now + LOAD_S / 2, Loading(cell, 0.5, "loading weights")
                now += LOAD_S
            for _ in range(TOKENS):
                yield now, Generating(cell, Chunk("a", (1,), (now,)), number, rounds)
                now += TOKEN_S
            yield now, Generated(cell, CellResult(cell.variant.notation))
    for cell in CELLS:
        yield now, Scoring(cell, None, "loading")
        now += SCORE_S * TOKENS
        yield now, Finished(cell, CellResult(cell.variant.notation))


def test_the_prompts_of_a_set_are_part_of_it():
    prompts = PromptSet("two", (SetPrompt("a", "Hello"), SetPrompt("b", "Hi")))
    plan, shares = Plan(replace(request(1), prompts=prompts)), []
    events = [*run(1), (200.0, Answering(CELLS[0], 1, 2)), (210.0, Answering(CELLS[0], 2, 2, 10.0))]
    for now, event in events:
        plan.apply(event, now)
        shares.append(plan.fraction)
    assert shares == sorted(shares) and shares[-1] < 1 and plan.left_s == 10.0
    assert [(s.name, s.done, s.of) for s in plan.stages if s.current] == [("Prompts", 1, 2)]


def test_it_never_runs_backwards():
    plan, shares, stages = Plan(request()), [], []
    for now, event in run(rounds=3):
        plan.apply(event, now)
        shares.append(plan.fraction)
        stages.append([(s.name, s.done) for s in plan.stages])
    assert shares == sorted(shares), f"the bar ran backwards: {shares}"
    for before, after in zip(stages, stages[1:], strict=False):
        lost = [s for s in before if dict(after).get(s[0], 99) < s[1]]
        assert not lost, f"a stage lost what it had done: {before} → {after}"
    assert stages[-1] == [("Answers", 3), ("Repeats", 3), ("Scores", 3)]


def test_the_next_run_is_estimated_from_the_last_one(tmp_path):
    first, pace = Plan(request(repeats=1)), Pace(tmp_path)
    assert first.left_s is None, "nothing has been measured, so there is no estimate"
    events = list(run(rounds=1))
    for now, event in events:
        first.apply(event, now)
    pace.remember("tiny", first.measured(), "prompt")
    took = events[-1][0] - events[0][0]
    again = Plan(request(repeats=1), Pace(tmp_path))
    assert abs(again.left_s - took) < 0.1 * took, f"estimated {again.left_s} s, it took {took} s"
    assert Plan(Request("other", CELLS, "Hello"), Pace(tmp_path)).left_s is None
    (tmp_path / "pace.json").write_text("[1, 2", encoding="utf-8")
    assert Plan(request(), Pace(tmp_path)).left_s is None, "a broken file only costs the estimate"


def test_time_left_is_known_once_one_column_has_answered():
    plan = Plan(request(repeats=1))
    for now, event in run(rounds=1):
        plan.apply(event, now)
        if isinstance(event, Generated):
            break
    rest = 2 * (LOAD_S + TOKENS * TOKEN_S) + 3 * TOKENS * TOKEN_S  # scoring is decoding, as far as is known
    assert abs(plan.left_s - rest) < 0.1 * rest
