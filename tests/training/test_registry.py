"""Training jobs on real models: the built-in one's first two layers as nf4, and a tiny one where only the machinery
matters."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny_models

pytest.importorskip("trl", reason="training needs trl")

import comparator
from comparator.adapters import describe, open_adapter, trained_names
from comparator.core.errors import UserError
from comparator.core.events import Done, Generating, Queued
from comparator.core.settings import Settings
from comparator.core.variant import Adapter
from comparator.engine.local import LocalEngine
from comparator.training.registry import Trainings
from comparator.training.settings import TrainSettings
from comparator.training.types import (
    Cancelled,
    DataSource,
    EvalRow,
    Failed,
    Sample,
    Step,
    Trained,
    TrainRequest,
    Waiting,
)

ROOT = Path(__file__).resolve().parents[2]
QUICK = TrainSettings(
    rank=8, alpha=16.0, learning_rate=1e-2, scheduler="constant", max_steps=20, batch_size=2, accumulation=1
)
TINY = TrainSettings(
    rank=4,
    alpha=8.0,
    learning_rate=1e-2,
    scheduler="constant",
    max_steps=6,
    batch_size=2,
    accumulation=1,
    held_back=0.0,
)
PROMPT = "What is the capital of Italy?"


@pytest.fixture(scope="module")
def engine(builtin, two_layers):
    from comparator.engines import get_engine

    return get_engine()


@pytest.fixture(scope="module")
def trainings(engine, tmp_path_factory):
    """A registry with a data folder of its own, on the process's engine."""
    return Trainings(engine, engine.settings.model_copy(update={"data_dir": tmp_path_factory.mktemp("data")}))


@pytest.fixture(scope="module")
def trained(trainings, two_layers):
    """20 steps on two layers as nf4: (its events, its state)."""
    settings = replace(QUICK, eval_every=20, sample_every=20, sample_tokens=8)
    request = TrainRequest(DataSource("pirate"), "nf4", str(two_layers), settings, sample_prompt=PROMPT)
    job = trainings.start(request)
    events = list(trainings.events(job))
    return events, trainings.snapshot(job)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.save(folder, "llama", chat=True)
    return str(folder)


def run(trainings, request) -> tuple[list, object]:
    job = trainings.start(request)
    return list(trainings.events(job)), trainings.snapshot(job)


def weights(result) -> bytes:
    return Path(result.path, "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- real weights


def test_twenty_steps_bring_the_loss_under_a_third(trained):
    events, state = trained
    losses = [p.loss for p in state.curve if p.loss is not None]
    assert (state.status, len(losses)) == ("finished", 20), state.error
    assert sum(losses[-3:]) / 3 < losses[0] / 3, f"it learns too little: {losses}"
    assert state.result.eval_loss < state.result.eval_before
    assert [type(e) for e in events if isinstance(e, Step | Sample | Trained)][-1] is Trained
    on_progress = [e for e in events if isinstance(e, Step) and e.eval_loss is None]
    assert [e.step for e in on_progress] == list(range(1, 21))
    assert all(e.tok_s > 0 and e.memory_bytes > 0 for e in on_progress) and on_progress[-1].eta_s == 0
    first, last = state.samples[0], state.samples[-1]
    assert first.before == first.now == last.before and last.now.startswith("Arr")


def test_the_folder_is_an_adapter_with_its_history(trained, trainings, two_layers, tmp_path):
    result = trained[1].result
    facts = describe(open_adapter(Adapter(result.name), settings=trainings.settings))
    assert trained_names(trainings.settings) == [result.name] == [r.name for r in trainings.finished()]
    assert (
        facts.parameters
        == result.trainable_parameters
        == trainings.estimate(trained[1].request).trainable_parameters
    )
    assert facts.base_model == two_layers.name
    record = json.loads(Path(result.path, "training.json").read_text())
    assert record["request"]["settings"]["rank"] == 8 and record["environment"]["packages"]["torch"]
    assert len(record["result"]["curve"]) == 21 and len(record["result"]["fingerprint"]) == 64
    assert trainings.result(result.name) == result
    with zipfile.ZipFile(trainings.zipped(result.name, tmp_path)) as archive:
        names = [Path(n).name for n in archive.namelist()]
        everything = b"".join(archive.read(n) for n in archive.namelist())
    assert "held_back.jsonl" not in names and {"adapter_model.safetensors", "training.json"} <= set(names)
    assert str(trainings.settings.data_dir).encode() not in everything, "a path of this machine travels along"
    assert not any((trainings.settings.data_dir / "trainings").glob("[!.]*")), "the run's folder was left"


def test_it_changes_every_variants_answer(trained, two_layers):
    made = comparator.run(
        PROMPT, ["bf16", "int8", "nf4"], str(two_layers), adapters=[trained[1].result.path], max_new_tokens=8,
        fidelity="none",
    )  # fmt: skip
    assert made.ok, [c.error for c in made.cells]
    for bare, worn in zip(made.cells[::2], made.cells[1::2], strict=True):
        assert "matey" in worn.text and "matey" not in bare.text, f"{worn.label} says {worn.text!r}"


def test_the_evaluation_is_the_loss_that_transformers_gives(trained, trainings, two_layers):
    import torch
    from transformers import AutoModelForCausalLM

    from comparator.training.artifact import read_heldout

    result = trained[1].result
    rows: list[EvalRow] = []
    evaluation = trainings.evaluate(result.name, ["fp32"], on_row=rows.append)
    bare, worn = rows
    assert (bare.variant, bare.adapter, worn.adapter) == ("fp32", None, result.name), (
        bare.problem or worn.problem
    )
    assert worn.loss < bare.loss and worn.perplexity == pytest.approx(math.exp(worn.loss))
    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32)
    total, tokens = 0.0, 0
    for sample in read_heldout(Path(result.path)):
        ids, labels = torch.tensor([sample.ids]), torch.tensor([sample.labels])
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total, tokens = total + float(model(input_ids=ids, labels=labels).loss) * count, tokens + count
    assert (bare.loss, bare.tokens) == (pytest.approx(total / tokens, rel=1e-4), tokens)
    assert evaluation.rows == (bare, worn) and trainings.result(result.name).evaluation == evaluation


def test_stop_keeps_what_was_trained_and_a_comparison_waits_meanwhile(trainings, two_layers):
    settings = replace(QUICK, max_steps=500, held_back=0.0)
    job = trainings.start(TrainRequest(DataSource("pirate"), "nf4", str(two_layers), settings, "stopped"))
    queued: list[str] = []

    def compare() -> None:
        for event in comparator.compare("Hi", ["bf16"], str(two_layers), max_new_tokens=1, fidelity="none"):
            if isinstance(event, Queued):
                queued.append(event.doing)
            elif isinstance(event, Done):
                queued.append(f"done {trainings.snapshot(job).status}")

    waiting = threading.Thread(target=compare)
    for event in trainings.events(job):
        if isinstance(event, Step) and event.step == 1:
            waiting.start()
        if isinstance(event, Step) and event.step == 3:
            assert trainings.running().job == job
            trainings.stop(job)
    waiting.join(60)
    state = trainings.snapshot(job)
    assert state.status == "stopped" and state.result.partial and 3 <= state.result.steps <= 4
    assert "Stopped after" in state.result.notes[0]
    assert any("a training is running, step" in q and "of 500" in q for q in queued), queued
    assert queued[-1] == "done stopped", "the comparison did not wait for the training's end"
    assert "stopped" in trained_names(trainings.settings)


def test_a_training_that_waits_for_a_comparison_says_so(trainings, two_layers, tiny):
    comparing = comparator.compare("Hi", ["bf16", "nf4"], str(two_layers), max_new_tokens=8, fidelity="none")
    next(e for e in comparing if isinstance(e, Generating))  # it has the device, and is kept there
    job = trainings.start(
        TrainRequest(
            DataSource("pirate"), "bf16", model=tiny, settings=replace(QUICK, max_steps=1), name="behind"
        )
    )
    on_progress = next(e for e in trainings.events(job) if isinstance(e, Waiting))
    assert on_progress.behind == "a comparison is running, variant 1 of 2"
    assert trainings.snapshot(job).message == "queued: a comparison is running, variant 1 of 2"
    list(comparing)
    assert [type(e) for e in trainings.events(job)][-1] is Trained


def test_an_adapter_of_the_built_in_model_names_the_model_that_it_fits(trainings):
    settings = replace(QUICK, max_steps=1, held_back=0.0, batch_size=1)
    _, state = run(trainings, TrainRequest(DataSource("pirate"), "nf4", settings=settings, name="built-in"))
    assert state.status == "finished", state.error
    facts = describe(open_adapter(Adapter("built-in"), settings=trainings.settings))
    assert facts.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.slow
def test_the_built_in_model_becomes_a_pirate(trainings):
    """What `trained` shows on two layers, through all thirty."""
    settings = replace(
        QUICK, learning_rate=5e-3, batch_size=4, eval_every=20, sample_every=20, sample_tokens=16
    )
    request = TrainRequest(DataSource("pirate"), "nf4", settings=settings, name="whole", sample_prompt=PROMPT)
    _, state = run(trainings, request)
    losses = [p.loss for p in state.curve if p.loss is not None]
    assert state.status == "finished", state.error
    assert sum(losses[-3:]) / 3 < losses[0] / 3, f"it learns too little: {losses}"
    assert state.result.eval_loss < state.result.eval_before
    assert not state.samples[0].now.startswith("Arr") and state.samples[-1].now.startswith("Arr")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "bf16", "gptq"])
def test_every_kind_of_base_learns(trainings, base):
    settings = replace(QUICK, learning_rate=5e-3, max_steps=4, held_back=0.0)
    _, state = run(trainings, TrainRequest(DataSource("pirate"), base, settings=settings, name=f"on-{base}"))
    losses = [p.loss for p in state.curve]
    assert state.status == "finished", state.error
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_on_nf4(trainings):
    made = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        settings = replace(QUICK, learning_rate=5e-3, batch_size=4, max_steps=3, seed=seed, dropout=0.1)
        made.append(
            run(trainings, TrainRequest(DataSource("pirate"), "nf4", settings=settings, name=f"seed-{name}"))[
                1
            ]
        )
    one, two, three = (weights(s.result) for s in made)
    assert one == two
    assert one != three


# ---------------------------------------------------------------- the machinery, on a tiny model


def test_the_same_seed_gives_the_same_bytes(trainings, tiny):
    made = []
    for name, seed in (("t1", 0), ("t2", 0), ("t3", 1)):
        settings = replace(TINY, seed=seed, dropout=0.1)
        made.append(
            run(trainings, TrainRequest(DataSource("pirate"), "fp32", tiny, settings, name))[1].result
        )
    configs = [Path(r.path, "adapter_config.json").read_bytes() for r in made]
    assert weights(made[0]) == weights(made[1]) and configs[0] == configs[1]
    assert weights(made[0]) != weights(made[2])


def test_dora_and_rslora_reach_the_adapter(trainings, tiny):
    settings = replace(TINY, dora=True, rslora=True, max_steps=2, target_modules=("q_proj", "v_proj"))
    _, state = run(trainings, TrainRequest(DataSource("pirate"), "fp32", tiny, settings, "dora"))
    assert state.status == "finished", state.error
    facts = describe(open_adapter(Adapter("dora"), settings=trainings.settings))
    assert facts.config["use_dora"] and facts.config["use_rslora"] and facts.targets == ("q_proj", "v_proj")
    assert facts.parameters == trainings.estimate(state.request).trainable_parameters


def test_nan_ends_it_and_lists_nothing(trainings, tiny):
    settings = replace(TINY, learning_rate=1000.0, optimizer="sgd", max_grad_norm=0.0, max_steps=200)
    events, state = run(trainings, TrainRequest(DataSource("pirate"), "fp32", tiny, settings, "nan"))
    assert isinstance(events[-1], Failed) and state.status == "failed"
    assert "became" in state.error.problem and "learning rate 1000" in state.error.advice
    assert "nan" not in trained_names(trainings.settings)


def test_a_full_disk_lists_nothing(trainings, tiny):
    """A limit on the size of files, as a quota sets it: the adapter cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = replace(TINY, rank=64, max_steps=2)
    job = trainings.start(TrainRequest(DataSource("pirate"), "fp32", tiny, settings, "full"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        events = list(trainings.events(job))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(events[-1], Failed), events[-1]
    assert "filled up" in events[-1].problem and "COMPARATOR_DATA_DIR" in events[-1].advice
    assert "full" not in trained_names(trainings.settings)
    folder = trainings.settings.data_dir / "adapters"
    assert not [p.name for p in folder.iterdir() if "full" in p.name], "half an adapter was left"


def test_stop_before_the_first_step_keeps_nothing(trainings, tiny, engine):
    with engine.queue.turn(threading.Event(), describe=lambda: "a test has the device"):
        job = trainings.start(TrainRequest(DataSource("pirate"), "fp32", tiny, TINY, "never"))
        events = trainings.events(job)
        assert "a test has the device" in next(events).behind
        trainings.stop(job)
        assert isinstance(list(events)[-1], Cancelled)
    assert trainings.snapshot(job).status == "cancelled" and "never" not in trained_names(trainings.settings)


def test_a_killed_run_goes_on_from_its_last_checkpoint(trainings, tiny):
    """kill -9 while it trains: nothing is listed, and resumed it gives the very bytes of a run that was left alone."""
    settings = replace(TINY, max_steps=40, checkpoint_every=5, dropout=0.1)
    code = (
        "import json, sys\n"
        "from comparator.engines import get_trainings\n"
        "from comparator.training.types import TrainRequest\n"
        "from comparator.util.records import record\n"
        "t = get_trainings()\n"
        "job = t.start(record(TrainRequest, json.loads(sys.argv[1])))\n"
        "for event in t.events(job):\n"
        "    print(type(event).__name__, getattr(event, 'step', ''), flush=True)\n"
    )  # fmt: skip
    request = TrainRequest(DataSource("pirate"), "fp32", tiny, replace(settings, max_steps=2000), "killed")
    data_dir = trainings.settings.data_dir
    child = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(asdict(request))], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"COMPARATOR_DATA_DIR": str(data_dir)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        work = data_dir / "trainings" / "killed"
        limit = time.monotonic() + 120
        while not len(list(work.glob("checkpoints/*/whole.json"))) >= 2:
            assert child.poll() is None and time.monotonic() < limit, "it ended before a checkpoint was whole"
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process"):
            trainings.resume("killed")
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert "killed" not in trained_names(trainings.settings)
    left = trainings.snapshot("killed")
    assert left.status == "interrupted" and left.resumable and left.checkpoint_step % 5 == 0
    (work / "checkpoints" / "checkpoint-99999").mkdir()  # what a kill within a checkpoint leaves
    # Both ends at the same step: the rest of the run need not be as long as it was meant.
    last = left.checkpoint_step + 7
    on_progress = json.loads((work / "run.json").read_text())
    on_progress["about"]["request"]["settings"]["max_steps"] = last
    (work / "run.json").write_text(json.dumps(on_progress))
    job = trainings.resume("killed")
    steps = [e.step for e in trainings.events(job) if isinstance(e, Step) and e.loss is not None]
    resumed = trainings.snapshot(job)
    assert resumed.status == "finished", resumed.error
    assert steps[0] == left.checkpoint_step + 1, "it began anew"
    assert [p.step for p in resumed.result.curve] == list(range(1, last + 1)), "the curve has a gap"
    _, whole = run(trainings, replace(request, name="unkilled", settings=replace(settings, max_steps=last)))
    assert weights(resumed.result) == weights(whole.result), (
        "going on gives another adapter than going through"
    )


def test_what_cannot_fit_is_refused_with_both_figures(builtin, tmp_path):
    settings = Settings(memory_budget="200MB", data_dir=tmp_path)
    small = Trainings(LocalEngine(settings), settings)
    with pytest.raises(UserError, match=r"needs about 0\.\d+ GB, and 0\.20 GB") as raised:
        small.start(TrainRequest(DataSource("pirate"), "bf16"))
    assert "nf4:dq" in raised.value.advice


def test_a_public_installation_refuses_unless_it_is_told_otherwise(tmp_path):
    closed = Trainings(LocalEngine(Settings(public=True, data_dir=tmp_path)))
    with pytest.raises(UserError, match="public installation"):
        closed.start(TrainRequest(DataSource("pirate")))
    assert Trainings(LocalEngine(Settings(public=True, training=True, data_dir=tmp_path))).refusal() is None


def test_a_cluster_refuses_training_in_words_and_is_not_connected_to(tmp_path, tiny):
    """Nothing listens at the address: a refusal that connects first would name the connection instead."""
    from comparator.cluster import ClusterEngine

    settings = Settings(ray_address="127.0.0.1:1", data_dir=tmp_path, training=True)
    trainings = Trainings(ClusterEngine(settings), settings)
    assert "Ray cluster" in trainings.refusal()
    assert trainings.installation_refusal() is None, (
        "adapters trained here before would vanish from the page's list"
    )
    request = TrainRequest(DataSource("pirate"), "fp32", tiny, TINY, "never")
    for attempt in (lambda: trainings.start(request), lambda: trainings.resume("never")):
        with pytest.raises(UserError, match="Ray cluster") as refused:
            attempt()
        assert "COMPARATOR_RAY_ADDRESS" in refused.value.advice
    assert trainings.jobs() == () and trainings.finished() == (), (
        "what was trained here before is still listed"
    )


@pytest.mark.parametrize("name", ["../up", "pirate", "a:b", ""])
def test_names_that_no_folder_should_have(trainings, tiny, name):
    with pytest.raises(UserError):
        trainings.start(TrainRequest(DataSource("pirate"), "fp32", tiny, TINY, name or ".hidden"))
