"""A judge model: any column or server compares two answers, in both orders, and its reasons are kept.

A judge prefers what stands first, or last, more often than chance (L. Zheng et al., "Judging LLM-as-a-Judge", 2023), so each
pair is asked twice with the answers exchanged, and counts as a tie where the two verdicts disagree.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest

from comparator.backends import source_kind
from comparator.comparison import ballots
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest, Prompt
from comparator.core.request import GenerationSettings
from comparator.core.result import Comparison
from comparator.core.state import ModelFacts
from comparator.core.variant import Cell
from comparator.core.votes import (
    LONGEST_REASON,
    MOST_JUDGEMENTS,
    MOST_JUDGES,
    Choice,
    Judge,
    Judgement,
    Votes,
)
from comparator.engine.protocol import Engine, OnProgress, ignore
from comparator.util import error_log, formatting

INSTRUCTIONS = """\
Two answers to one request follow. Which is better? Correct comes first, then complete, then clear. Do not prefer an answer \
because it is longer, or because it stands first.

[Request]
{request}
[End of request]

[Answer A]
{a}
[End of answer A]

[Answer B]
{b}
[End of answer B]

Give your reason in one or two sentences. Then write one last line, exactly one of:
Verdict: A
Verdict: B
Verdict: tie"""
NEW_TOKENS = 200
LAST_TOKENS = 4  # after “Verdict:”, where its reply has none
TOO_LONG = "The request and the answers do not fit into the judge's context."
_VERDICT = re.compile(r"[*_#]*verdict\W{0,8}(tie|a|b)\b", re.IGNORECASE)
_BEGINNING = re.compile(r"\W*(tie|a|b)\b", re.IGNORECASE)
_ALONE = re.compile(r"\W*(?:answer\W+)?(tie|a|b)\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Judging:
    """Which model judges, and how many pairs at most, those judged before among them. `fresh`: these are judged again."""

    model: str
    cell: Cell
    limit: int = MOST_JUDGEMENTS
    new_tokens: int = NEW_TOKENS
    fresh: bool = False


def judge(
    comparison: Comparison,
    judging: Judging,
    *,
    engine: Engine,
    cancel: threading.Event,
    on_progress: OnProgress = ignore,
    on_judge: Callable[[Judge], None] = ignore,
) -> Judge:
    """The judge's verdicts on the pairs of different answers; `on_judge` gets them after each pair.

    Raises `UserError`, and `Stopped` at Stop, after which what `on_judge` got is whole. The answer is greedy.
    """

    def waiting(ahead: int, _doing: str) -> None:
        on_progress(None, f"{formatting.plural(ahead, 'run')} ahead")

    pairs = pairs_to_judge(comparison, judging.limit)
    if not pairs:
        raise UserError("There is no pair of different answers to judge.", "Run two variants or more.")
    with (
        error_log.hidden(*(text for pair in pairs for text in _texts(comparison, pair))),
        engine.queue.turn(cancel, waiting, lambda: "a judge compares answers"),
    ):
        facts = engine.open(judging.model, cancel, on_progress)
        exact = engine.complete(judging.model, judging.cell, cancel, on_progress)
        loaded = engine.load(LoadRequest(judging.model, exact.variant, exact.adapter), cancel, on_progress)
        bench = _Bench(judging, engine, exact, loaded.handle, facts, cancel)
        made = _begun(comparison, judging, exact.label)
        done = {(j.prompt, j.left, j.right) for j in made.judgements}
        todo, began_s = [pair for pair in pairs if pair not in done], time.monotonic()
        for number, pair in enumerate(todo):
            left_s = (time.monotonic() - began_s) / number * (len(todo) - number) if number else None
            left = f", {formatting.duration(left_s)} left" if left_s is not None else ""
            on_progress(number / len(todo), f"pair {number + 1:,} of {len(todo):,}{left}")
            made = replace(made, judgements=(*made.judgements, bench.judge(comparison, pair)))
            on_judge(made)
    return made


def pairs_to_judge(comparison: Comparison, limit: int) -> list[tuple[int, int, int]]:
    """(prompt, column, column) of different answers: one pair of every prompt before a second of any, and each two columns
    about as often as any other."""
    by_prompt: dict[int, list[tuple[int, int, int]]] = {}
    for pair in ballots.left_for(comparison, ""):
        by_prompt.setdefault(pair[0], []).append(pair)
    turned = (pairs[n % len(pairs) :] + pairs[: n % len(pairs)] for n, pairs in enumerate(by_prompt.values()))
    rounds = [pair for round_ in zip_longest(*turned) for pair in round_ if pair is not None]
    return rounds[: max(0, min(limit, MOST_JUDGEMENTS))]


def with_judge(comparison: Comparison, judge: Judge) -> Votes:
    """The comparison's votes with this judge's verdicts, in place of its earlier ones; the oldest judges make way."""
    votes = comparison.votes or Votes()
    others = [j for j in votes.judges if (j.model, j.column) != (judge.model, judge.column)]
    room = MOST_JUDGEMENTS - len(judge.judgements)
    while len(others) >= MOST_JUDGES or sum(len(j.judgements) for j in others) > room:
        others.pop(0)
    return replace(votes, judges=(*others, judge))


def _begun(comparison: Comparison, judging: Judging, label: str) -> Judge:
    """What this judge said earlier by the same instructions, or nothing."""
    new = Judge(judging.model, label, INSTRUCTIONS)
    earlier = comparison.votes.judges if comparison.votes and not judging.fresh else ()
    same = (j for j in earlier if replace(j, judgements=()) == new)
    return next(same, new)


def _texts(comparison: Comparison, pair: tuple[int, int, int]) -> tuple[str, str, str]:
    """(request, answer, answer)."""
    turns = ballots.turns(comparison, pair[0])
    request = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)
    texts = ballots.answers(comparison, pair[0])
    return request, texts[pair[1]] or "", texts[pair[2]] or ""


@dataclass(frozen=True)
class _Bench:
    """A resident judge, and how to ask it."""

    judging: Judging
    engine: Engine
    cell: Cell
    handle: str
    facts: ModelFacts
    cancel: threading.Event

    @property
    def is_server(self) -> bool:
        """It may have another model, with a tokenizer and a chat template of its own."""
        return source_kind(self.cell.variant) == "endpoint"

    def judge(self, comparison: Comparison, pair: tuple[int, int, int]) -> Judgement:
        """One pair, in both orders."""
        request, *texts = _texts(comparison, pair)
        (first, reason), (second, other) = (self._ask(request, a, b) for a, b in (texts, reversed(texts)))
        sides: dict[str | None, Choice | None] = {"a": "left", "b": "right", "tie": "tie", None: None}
        exchanged: dict[str | None, Choice | None] = {**sides, "a": "right", "b": "left"}
        return Judgement(*pair, sides[first], exchanged[second], (reason, other))

    def _ask(self, request: str, a: str, b: str) -> tuple[str | None, str]:
        """(verdict or None, reason)."""
        # Not `format`: answers may have braces.
        parts = {"{request}": request, "{a}": a or "(empty)", "{b}": b or "(empty)"}
        text = re.sub(r"\{(?:request|a|b)\}", lambda place: parts[place.group()], INSTRUCTIONS)
        prompt = self.engine.encode(self.judging.model, text, None, None)
        if self._too_long(prompt):
            return None, TOO_LONG
        if self.is_server:
            prompt = replace(prompt, token_ids=(), text="")
        reply, is_whole = self._reply(prompt, self.judging.new_tokens)
        verdict, reason = read_verdict(reply)
        if verdict is None and is_whole and not self.is_server:
            begun = f"{prompt.text}{reply.rstrip()}\nVerdict:"
            rest, _ = self._reply(self.engine.encode(self.judging.model, begun, None, False), LAST_TOKENS)
            completed = _BEGINNING.match(rest)
            verdict = completed.group(1).lower() if completed else None
        return verdict, reason

    def _reply(self, prompt: Prompt, new_tokens: int) -> tuple[str, bool]:
        """(its greedy reply after the thinking, whether it came to an end of that). Raises `Stopped`."""
        settings = GenerationSettings(max_new_tokens=new_tokens)
        made = self.engine.generate(self.handle, prompt, settings, self.cancel, adapter=self.cell.adapter)
        if self.cancel.is_set():
            raise Stopped
        start = made.thinking.characters if made.thinking else 0
        return made.text[start:], not made.thinking or start < len(made.text)

    def _too_long(self, prompt: Prompt) -> bool:
        count = len(prompt.token_ids)
        context = None if self.is_server else self.facts.context_length
        return count > self.engine.settings.max_prompt_tokens or (
            bool(context) and count + self.judging.new_tokens + 2 * LAST_TOKENS > context
        )


def read_verdict(text: str) -> tuple[str | None, str]:
    """("a", "b", "tie", or None where there is none; the reason before it) of what a judge wrote."""
    verdicts = list(_VERDICT.finditer(text))
    if verdicts:
        return verdicts[-1].group(1).lower(), shortened(text[: verdicts[-1].start()])
    lines = text.strip().splitlines()
    alone = _ALONE.fullmatch(lines[-1]) if lines else None
    return (alone.group(1).lower(), shortened("\n".join(lines[:-1]))) if alone else (None, shortened(text))


def shortened(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST_REASON else f"{flat[: LONGEST_REASON - 1]}…"
