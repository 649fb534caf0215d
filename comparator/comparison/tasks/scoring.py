"""Answers → the harness's scores with their standard errors, and what each document came to."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from comparator.comparison.tasks.catalog import Document, Tasks
from comparator.core.prompt_set import SetAnswer, SetPrompt, TaskScore
from comparator.fidelity.harness import Answer
from comparator.util import stats

BOOTSTRAP = 1_000  # resamples, for metrics whose standard error has no formula
LONGEST = 4_000  # characters of a document's text that are kept, less where there are thousands: the end, which has the question
ROOM = 8_000_000  # characters of all of them

Answers = Mapping[
    int, Sequence[Sequence[Answer]]
]  # by document: for each request, one for each of its repeats


@dataclass(frozen=True)
class ColumnScores:
    """`results`: {task or group: {"acc,none": value, "acc_stderr,none": …}}; `samples`: the harness's, by task.
    `by_document`: those of a task's first filter, by (task, document)."""

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    higher_is_better: dict[str, dict[str, bool | None]]

    @cached_property
    def by_document(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {
            (task, sample["doc_id"]): sample
            for task, samples in self.samples.items()
            for sample in samples
            if sample["filter"] == samples[0]["filter"]
        }


def score(tasks: Tasks, answers: Answers, count: int) -> ColumnScores:
    """One column's scores over the first `count` documents."""
    from lm_eval.evaluator import evaluate

    done = tasks.documents[:count]
    numbers = {name: range(sum(d.task == name for d in done)) for name in tasks.by_name}
    loaded = {**tasks.loaded, "tasks": {n: t for n, t in tasks.by_name.items() if numbers[n]}}
    if count < len(tasks.documents):  # a group's mean over some of its tasks would be another figure
        loaded |= {"groups": {}, "group_map": {}}
    tasks.begin()
    log = logging.getLogger("lm_eval")
    log.setLevel(logging.ERROR)
    results = evaluate(
        lm=_replay(tasks, answers),
        task_dict=loaded,
        samples=numbers,
        bootstrap_iters=BOOTSTRAP,
        log_samples=True,
    )
    every = {**results["results"], **results.get("groups", {})}
    return ColumnScores(every, results["samples"], results["higher_is_better"])


def _replay(tasks: Tasks, answers: Answers) -> Any:
    """A model of the harness that gives known answers."""
    from lm_eval.api.model import LM, hash_args

    known: dict[tuple, list[Answer]] = {}
    for number, given in answers.items():
        document = tasks.documents[number]
        for instance, repeats in zip(document.instances, given, strict=True):
            key = (
                document.task,
                document.number,
                instance.idx,
                hash_args(instance.request_type, instance.args),
            )
            known[key] = list(repeats)

    class Replay(LM):
        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            return [
                known[r.task_name, r.doc_id, r.idx, hash_args(r.request_type, r.args)].pop(0)
                for r in requests
            ]

        loglikelihood_rolling = generate_until = loglikelihood

    return Replay()


def scores(
    tasks: Tasks, columns: Sequence[ColumnScores | None], reference: int | None
) -> tuple[TaskScore, ...]:
    """Every metric of every task and group. `columns`: None for one without scores."""
    listed: dict[tuple[str, str, str], None] = {}
    for column in filter(None, columns):
        for task, figures in column.results.items():
            for key in figures:
                metric, comma, filter_name = key.partition(",")
                if comma and not metric.endswith("_stderr"):
                    listed[task, metric, filter_name] = None
    return tuple(_score(task, metric, kind, columns, reference) for task, metric, kind in listed)


def _score(
    task: str, metric: str, kind: str, columns: Sequence[ColumnScores | None], reference: int | None
) -> TaskScore:
    def figure(column: ColumnScores | None, name: str) -> float | None:
        return _number(column.results.get(task, {}).get(f"{name},{kind}")) if column else None

    values = tuple(figure(c, metric) for c in columns)
    each = [_values(c, task, metric, kind) for c in columns]
    base = each[reference] if reference is not None else None
    pairs = [
        _difference(mine, base) if number != reference and _is_mean(mine, value) else None
        for number, (mine, value) in enumerate(zip(each, values, strict=True))
    ]
    known = next(c for c in columns if c and figure(c, metric) is not None or c)
    return TaskScore(
        task, metric, kind, known.higher_is_better.get(task, {}).get(metric),
        int(known.results.get(task, {}).get("sample_len") or max((len(v) for v in each if v), default=0)), values,
        tuple(figure(c, f"{metric}_stderr") for c in columns),
        tuple(p.mean if p else None for p in pairs), tuple(p.se if p else None for p in pairs),
    )  # fmt: skip


def _values(column: ColumnScores | None, task: str, metric: str, kind: str) -> list[float] | None:
    """A metric's value for each document, where it is a number."""
    samples = column.samples.get(task, []) if column else []
    values = [_number(s.get(metric)) for s in samples if s["filter"] == kind]
    known = [v for v in values if v is not None]
    return known if values and len(known) == len(values) else None


def _is_mean(each: list[float] | None, value: float | None) -> bool:
    return (
        each is not None
        and value is not None
        and math.isclose(math.fsum(each) / len(each), value, abs_tol=1e-9)
    )


def _difference(mine: list[float] | None, base: list[float] | None) -> stats.Mean | None:
    if mine is None or base is None or len(mine) != len(base):
        return None
    return stats.clustered([a - b for a, b in zip(mine, base, strict=True)])


def _number(value: Any) -> float | None:
    """None for what is no finite number: “N/A”, a tuple, infinity."""
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------- documents


def first_metric(column: ColumnScores, task: str) -> tuple[str, str]:
    """(metric, filter) by which a task's documents are right or wrong: the first of both that it lists."""
    sample = column.samples[task][0]
    return sample["metrics"][0], sample["filter"]


def prompts(tasks: Tasks, columns: Sequence[ColumnScores | None]) -> tuple[SetPrompt, ...]:
    """The documents that were scored, as prompts of a set, in the tasks' order."""
    known = next(filter(None, columns))
    made, several, longest = [], len(tasks.by_name) > 1, room(len(tasks.documents))
    for document in tasks.documents:
        sample = known.by_document.get((document.task, document.number))
        if sample is None:
            continue
        made.append(
            SetPrompt(
                f"{document.task}:{document.number}" if several else str(document.number), _question(tasks, document)[-longest:],
                expected=(_target(document, sample["target"])[:longest],), check=first_metric(known, document.task)[0],
                kind=document.task[:40] if several else "",
            )
        )  # fmt: skip
    return tuple(made)


def room(count: int) -> int:
    """Characters of each of so many texts that are kept."""
    return max(200, min(LONGEST, ROOM // max(count, 1)))


def text_of(document: Document) -> str:
    """What the model reads before it answers, or all of a text that is scored as a whole; its end, where it is long."""
    arguments = document.instances[0].args
    text = str(arguments[0] or (arguments[1] if len(arguments) > 1 else ""))
    return text if len(text) <= LONGEST else f"… {text[-LONGEST:]}"


def _question(tasks: Tasks, document: Document) -> str:
    """The document alone, without the examples before it."""
    context = text_of(document)
    question = tasks.by_name[document.task].doc_to_text(document.instances[0].doc)
    return question if isinstance(question, str) and question and context.endswith(question) else context


def answer(
    column: ColumnScores, document: Document, binary: bool, longest: int = LONGEST
) -> SetAnswer | None:
    """What a column made of a document. `binary`: its metric says right or wrong."""
    sample = column.by_document.get((document.task, document.number))
    if sample is None:
        return None
    value = _number(sample.get(first_metric(column, document.task)[0]))
    return SetAnswer(
        _said(document, sample)[:longest],
        passed=bool(value) if binary and value is not None else None,
        score=None if binary else value,
    )


def is_binary(columns: Sequence[ColumnScores | None], task: str) -> bool:
    values = [
        _values(column, task, *first_metric(column, task))
        for column in columns
        if column and task in column.samples
    ]
    return bool(values) and all(each is not None and set(each) <= {0.0, 1.0} for each in values)


def _target(document: Document, target: Any) -> str:
    """The right answer as text: a choice is named by its number."""
    choices = [i.args[1] for i in document.instances if i.request_type == "loglikelihood"]
    if isinstance(target, int) and 0 <= target < len(choices):
        return str(choices[target]).strip()
    return str(target)


def _said(document: Document, sample: dict[str, Any]) -> str:
    """The text that was generated, the most likely of several choices, else the log-probability."""
    given = [repeats[0] for repeats in sample["resps"]]
    if isinstance(given[0], str):
        return given[0]
    if isinstance(given[0], float):
        return f"log-probability {given[0]:.3f}"
    if len(given) == 1:
        return f"log-probability {given[0][0]:.3f}{', the most likely tokens' if given[0][1] else ''}"
    best = max(range(len(given)), key=lambda n: given[n][0])
    listed = "\n".join(
        f"{given[n][0]:9.3f}  {str(i.args[1]).strip()}"
        for n, i in enumerate(document.instances[: len(given)])
    )
    return f"{str(document.instances[best].args[1]).strip()}\n\nlog-probability of each:\n{listed}"
