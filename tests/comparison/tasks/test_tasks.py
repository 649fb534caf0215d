"""Tasks of lm-evaluation-harness: the scores of its own class on the same weights, flips, Stop, another runtime, refusals."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from comparator.backends import resolve
from comparator.comparison import runner
from comparator.comparison.tasks import catalog
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.events import Answering
from comparator.core.request import GenerationSettings, Request, TaskRequest
from comparator.core.settings import Settings
from comparator.core.variant import Cell
from comparator.reporting import export, prompt_set

TASKS = Path(__file__).with_name("tasks")


@pytest.fixture(scope="module")
def request_(two_layers) -> Request:
    return Request(
        str(two_layers), tuple(Cell(resolve(v)) for v in ("bf16", "nf4")), "", fidelity="none", resume=False,
        task=TaskRequest((str(TASKS),)), settings=GenerationSettings(max_new_tokens=2, repeats=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(engine, request_):
    return runner.run(request_, engine=engine, emit=lambda event: None)


@pytest.fixture(scope="module")
def direct(two_layers):
    """The harness by itself, as `lm_eval --model hf` runs it."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from comparator.util.compat.lm_eval import load_yaml

    specs = []
    for path in sorted(TASKS.glob("*.yaml")):
        config = load_yaml(path)
        config["dataset_kwargs"]["data_files"] = {"test": str(path.with_suffix(".jsonl"))}
        specs.append(config)
    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(two_layers), batch_size=1)
    return simple_evaluate(
        lm, tasks=specs, bootstrap_iters=1000, task_manager=TaskManager(include_defaults=False)
    )


def test_scores_are_those_of_the_harness_by_itself(measured, direct) -> None:
    scores = measured.prompt_set.task.scores
    known = {
        (task, key.partition(",")[0]): value
        for task, figures in direct["results"].items() for key, value in figures.items() if "," in key
    }  # fmt: skip
    assert {s.task for s in scores} == {"capitals", "numbers", "passage"} and len(scores) == 5
    for score in scores:
        assert score.values[0] == pytest.approx(known[score.task, score.metric], abs=1e-12)
        error = known[score.task, f"{score.metric}_stderr"]
        assert score.errors[0] == (None if error == "N/A" else pytest.approx(error, abs=1e-12))
        assert score.values[1] is not None, "the quantized column has no score"


def test_every_answer_is_that_of_the_harness_by_itself(measured, direct) -> None:
    """Scores of a few documents may agree by chance: log-probabilities and texts do not."""
    answers = {
        p.id: a.text for p, a in zip(measured.prompt_set.prompts, measured.prompt_set.answers[0], strict=True)
    }
    for task, samples in direct["samples"].items():
        for sample in samples:
            text, given = answers[f"{task}:{sample['doc_id']}"], [r[0] for r in sample["resps"]]
            if task == "numbers":
                assert text == given[0]
            for value in (g[0] if isinstance(g, tuple) else g for g in given if not isinstance(g, str)):
                assert f"{value:.3f}" in text, f"{task} {sample['doc_id']}: another log-probability"


def test_documents_are_paired(measured) -> None:
    _, other = prompt_set.summaries(measured)
    accuracy = next(s for s in measured.prompt_set.task.scores if s.metric == "acc")
    assert accuracy.differences[0] is None and accuracy.differences[1] == pytest.approx(
        accuracy.values[1] - accuracy.values[0]
    )
    right = [[bool(a.passed) for a in column[:6]] for column in measured.prompt_set.answers]
    assert accuracy.values == tuple(sum(column) / 6 for column in right), (
        "a document's answer is not what was scored"
    )
    assert other.checked == 9 and other.p is not None, "a perplexity is no right or wrong"
    assert measured.prompt_set.prompts[0].expected == ("Paris",)
    assert measured.prompt_set.prompts[0].prompt == "Question: What is the capital of France?\nAnswer:"
    assert measured.prompt.text.endswith(measured.prompt_set.prompts[0].prompt), (
        "the latencies are of another prompt"
    )


def test_a_task_is_in_the_document_and_in_reports(measured) -> None:
    assert measured.schema == 2 and document.loads(document.dumps(measured)) == measured
    for name in ("a.html", "a.md"):
        report = export.render(measured, name)
        assert "capitals acc" in report.replace("\\_", "_") and "lm-evaluation-harness" in report
    assert str(TASKS.parent) not in document.dumps(measured), "the document names a folder of this machine"


def test_stop_keeps_whole_documents_and_the_next_run_resumes(engine, request_) -> None:
    cancel = threading.Event()

    def stop(event) -> None:
        if isinstance(event, Answering) and event.number == 3:
            cancel.set()

    asked = replace(request_, resume=True, task=TaskRequest((str(TASKS / "capitals.yaml"),)))
    part = runner.run(asked, engine=engine, emit=stop, cancel=cancel).prompt_set
    assert len(part.prompts) == 2 and part.task.total == 6
    assert part.task.scores[0].documents == 2
    whole = runner.run(asked, engine=engine, emit=lambda event: None).prompt_set
    assert whole.resumed >= 4 and len(whole.prompts) == 6
    fresh = runner.run(replace(asked, resume=False), engine=engine, emit=lambda event: None).prompt_set
    assert fresh.task.scores == whole.task.scores


def test_a_limit(engine, request_) -> None:
    asked = replace(request_, task=TaskRequest((str(TASKS / "capitals.yaml"),), limit=2, fewshot=0))
    result = runner.run(asked, engine=engine, emit=lambda event: None).prompt_set
    assert len(result.prompts) == 2 and result.task.fewshot == {"capitals": 0}
    assert result.prompts[0].prompt == "Question: What is the capital of France?\nAnswer:"


@pytest.mark.slow  # it reads the thousands of tasks that the harness knows
def test_a_name_that_is_not_known_gets_the_nearest_ones() -> None:
    with pytest.raises(UserError, match="arc_eazy") as problem:
        catalog.load(TaskRequest(("arc_eazy",)))
    assert "arc_easy" in problem.value.advice


def test_a_task_that_cannot_be_run_is_refused_with_a_way_out(tmp_path, request_) -> None:
    with pytest.raises(UserError, match="no YAML"):
        catalog.load(TaskRequest((str(tmp_path),)))
    shutil.copy(TASKS / "capitals.yaml", tmp_path)  # without its data
    with pytest.raises(UserError, match="data of capitals"):
        catalog.load(TaskRequest((str(tmp_path),)))
    with pytest.raises(UserError, match="public server"):
        runner.checked(request_, Settings(public=True))
    with pytest.raises(UserError, match="0 documents"):
        runner.checked(replace(request_, task=TaskRequest(("arc_easy",), limit=0)), Settings())


def test_without_the_package_the_command_is_named(monkeypatch, request_) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(catalog, "version", missing)
    with pytest.raises(UserError) as problem:
        runner.checked(request_, Settings())
    assert problem.value.advice == "pip install -r requirements-tasks.txt"


def test_the_examples_are_what_the_documents_say() -> None:
    """docs/tasks.md shows this folder's task."""
    shown = (TASKS.parents[3] / "docs" / "tasks.md").read_text()
    assert (TASKS / "capitals.yaml").read_text().strip() in shown
    assert json.loads((TASKS / "capitals.jsonl").read_text().splitlines()[0])
