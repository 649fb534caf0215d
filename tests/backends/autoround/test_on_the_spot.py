"""AutoRound on the spot: made by the auto-round package in a process of its own, kept, and loaded as a source is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import gptq_models
import pytest
import tiny_models

from comparator.backends import backend_for, presets, resolve
from comparator.backends.base import Placement
from comparator.backends.gptqmodel_layers import on_the_spot
from comparator.cli.inspect import described
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.events import Done, Loading
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import get_settings
from comparator.core.variant import Cell
from comparator.engine.local import LocalEngine
from comparator.sources import open_checkpoint

if importlib.util.find_spec("auto_round") is None:  # not imported: that patches transformers
    pytest.skip("requirements-autoround.txt is missing, which `make test` installs", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
ROUND = backend_for(resolve("autoround"))


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Its own cache, so that what is made here is made here."""
    folder = tmp_path_factory.mktemp("autoround-made")
    with gptq_models.settings_in(folder / "cache"):
        yield folder


@pytest.fixture(scope="module")
def engine(place):
    engine = LocalEngine()
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def tiny(place) -> Path:
    tiny_models.save(
        place / "tiny", "llama", num_hidden_layers=1, hidden_size=64, intermediate_size=144
    )  # 144 = 4.5 × 32
    return place / "tiny"


def run(engine, model: Path, *variants: str, cancel=None, stop_at: str = "-"):
    request = Request(
        str(model), tuple(Cell(resolve(v)) for v in variants), "The capital of France is", chat=False,
        settings=GenerationSettings(max_new_tokens=8), fidelity="none",
    )  # fmt: skip
    events = []
    for event in compare(request, engine=engine, cancel=cancel):
        events.append(event)
        if isinstance(event, Loading) and event.message.startswith(stop_at):
            cancel.set()
    assert isinstance(events[-1], Done)
    return [e for e in events if isinstance(e, Loading)], events[-1].comparison


def made(model: Path, notation: str, cal: str = "") -> Path:
    """Where the checkpoint of a variant is kept."""
    checkpoint = open_checkpoint(str(model))
    recipe = ROUND.recipe(ROUND.complete(resolve(notation), checkpoint))
    return on_the_spot.folder(checkpoint, recipe, cal, get_settings().cache_dir)


@pytest.mark.slow
def test_it_is_stopped_then_made_then_taken_from_the_cache(tiny, engine, place):
    """One test, since each process takes seconds to start: Stop leaves nothing, the whole run progress and a column with
    the packed layers, the next one no quantizing."""
    cancel = threading.Event()
    _, stopped = run(engine, tiny, "autoround:iters=2", cancel=cancel, stop_at="starting torch")
    assert stopped.cells[0].status == "stopped" and not made(tiny, "autoround:iters=2").exists()
    said, comparison = run(engine, tiny, "autoround:iters=2")
    column = comparison.cells[0]
    assert column.status == "ok", column.error
    assert column.variant == "autoround:g64,iters=2" and column.kernel == "gptqmodel TorchAtenLinear"
    layers = dict.fromkeys(e.message.split(",")[0] for e in said if "quantizing layer" in e.message)
    assert list(layers) == ["quantizing layer 1 of 1"], "hooks of auto-round's passes"
    fractions = [e.fraction for e in said if "quantizing" in e.message]
    assert fractions == sorted(fractions) and all(
        "left" in e.message for e in said if "quantizing layer" in e.message
    )
    stored = {row.name.rsplit(".", 2)[-2]: row.logical_dtype for row in column.layers}
    assert stored["q_proj"] == "int4 (AutoRound)" and stored["gate_proj"] == "fp16", (
        "144 is no multiple of 32"
    )
    again, second = run(engine, tiny, "autoround:iters=2,kernel=torch")
    assert not [e for e in again if "quantizing" in e.message], "the kernel is not in the cache's key"
    assert second.cells[0].status == "ok" and second.environment.packages["auto_round"]
    assert "auto_round" not in sys.modules, "importing it patches transformers for every other column"


def test_what_decides_the_weights_decides_the_folder(tiny):
    same = {made(tiny, f"autoround{n}") for n in ("", ":g64", ":kernel=torch", ":dtype=bf16", ":iters=200")}
    other = {made(tiny, f"autoround:{n}") for n in ("g32", "8bit", "sym=false", "iters=50")}
    assert len(same) == 1 and len(same | other | {made(tiny, "autoround", "c4")}) == 6


def refused(action, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert caught.value.advice and all(word in str(caught.value) for word in words), str(caught.value)


def test_what_cannot_be_made_is_refused_before_any_work(tiny, tmp_path):
    model = open_checkpoint(str(tiny))
    refused(lambda: resolve("autoround:8bit,sym=false"), "8-bit", "sym=false")
    refused(lambda: resolve("autoround:iters=2.5"), "whole number")
    refused(lambda: resolve("autoround:cal=my.txt"), "cal=my.txt", "--calibration")
    refused(lambda: ROUND.complete(resolve("autoround:g128"), model), "128", "64 inputs")
    for family, sizes in (("gpt2", {"n_embd": 64}), ("mixtral", {"hidden_size": 64})):
        tiny_models.save(tmp_path / family, family, **sizes)
        other = open_checkpoint(str(tmp_path / family))
        refused(lambda o=other: ROUND.complete(resolve("autoround"), o), other.architecture, "nf4")
    variant = ROUND.complete(resolve("autoround:kernel=marlin"), model)
    refused(lambda: ROUND.prepare(model, variant, Placement("cpu"), lambda *_: None), "marlin")


def test_without_the_package_ready_made_checkpoints_are_left(monkeypatch):
    monkeypatch.setattr(type(ROUND), "making", ("no_such_package",))
    reason = "no_such_package is not installed: pip install -r requirements-autoround.txt"
    assert ROUND.unavailable(resolve("autoround")) == reason
    assert ROUND.unavailable() is None and ROUND.unavailable(resolve("autoround@user/repo")) is None
    assert next(m for m in described() if m["method"] == "autoround")["not_made_here"] == reason
    assert "auto-round==" in (ROOT / "requirements-autoround.txt").read_text() and "autoround" in presets()


@pytest.mark.slow
def test_learning_beats_rounding_and_plain_transformers_gives_the_same_tokens(two_layers, engine, tmp_path):
    """Real weights: the model's last hidden states on the calibration text, against iters=0; then the code to copy, in a process of its
    own, since there transformers loads the folder with the auto-round package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from comparator.backends import calibration
    from comparator.reporting.snippet import snippet

    _, comparison = run(
        engine, two_layers, "autoround:iters=15", "autoround:iters=0", "autoround:iters=0,sym=false"
    )
    assert [c.status for c in comparison.cells] == ["ok"] * 3, comparison.cells[2].error
    ids = calibration.samples(AutoTokenizer.from_pretrained(two_layers), calibration.texts("", tmp_path))

    def output(model):
        with torch.no_grad():
            return model.model(torch.tensor(ids[:8])).last_hidden_state.float()

    exact = output(AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32))
    errors = {}
    for iters in (15, 0):
        checkpoint = open_checkpoint(str(two_layers))
        variant = ROUND.complete(resolve(f"autoround:iters={iters},kernel=torch"), checkpoint)
        model = ROUND.load(checkpoint, variant, Placement("cpu"), lambda *_: None).model
        errors[iters] = float((output(model) - exact).square().mean())
    assert errors[15] < 0.75 * errors[0], errors

    column = comparison.cells[0]
    (tmp_path / on_the_spot.folder_name(resolve(column.variant))).symlink_to(made(two_layers, column.variant))
    code = snippet(column, comparison) + "\nprint('ids', *[int(i) for i in new_tokens])\n"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    line = next(line for line in ended.stdout.splitlines() if line.startswith("ids "))
    assert tuple(map(int, line.split()[1:])) == column.token_ids
