"""What strangers may do with trainings on a public server: with their own alone, within limits, without a login."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from model_hub import as_the_hub

pytest.importorskip("trl", reason="training needs trl")

from comparator.api import request
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.engine.local import LocalEngine
from comparator.sources import isolated, tokenizer
from comparator.training import artifact, data, run_store, strangers_data, tokenize
from comparator.training.registry import Trainings
from comparator.training.settings import TrainSettings
from comparator.training.types import DataSource, Sample, Trained, TrainRequest
from comparator.ui import admission as admission_module
from comparator.ui.admission import Admission

ADA, EVE = "a" * 22, "e" * 22
SHORT = TrainSettings(max_steps=1, batch_size=1, accumulation=1, max_length=16, held_back=0.0, rank=1)


@pytest.fixture
def public(tmp_path) -> Trainings:
    settings = Settings(public=True, training=True, data_dir=tmp_path, max_adapters=2)
    return Trainings(LocalEngine(settings), settings)


def unfinished(trainings: Trainings, key: str, name: str) -> None:
    """A run of this visitor that was interrupted."""
    mine = trainings.seen_by(key)
    about = artifact.About(
        name, name, TrainRequest(DataSource("pirate"), name=name), "pirate", "", 1, 0, owner=mine._owner
    )
    run_store.new(
        trainings._work, about, trainings._work.parent / "adapters" / name, tokenize.Corpus((), (), (), ())
    ).close()


def trained(trainings: Trainings, key: str, name: str) -> Path:
    """An adapter of this visitor."""
    folder = trainings._work.parent / "adapters" / name
    folder.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        (folder / file).write_text("{}")
    (folder / artifact.OWNER).write_text(trainings.seen_by(key)._owner)
    return folder


def test_a_stranger_reaches_nobodys_trainings(public, monkeypatch):
    unfinished(public, ADA, "adas-run")
    folder = trained(public, ADA, "adas-adapter")
    ada, eve, nobody = (public.seen_by(key) for key in (ADA, EVE, None))
    assert [s.job for s in ada.jobs()] == ["adas-run"] and ada.owns_adapter("adas-adapter")
    for other in (eve, nobody):
        assert not other.jobs() and not other.finished() and not other.owns_adapter("adas-adapter")
        for attack, *arguments in (
            (other.snapshot, "adas-run"),
            (other.resume, "adas-run"),
            (other.forget, "adas-run"),
            (other.stop, "adas-run"),
            (other.remove, "adas-adapter"),
            (other.result, "adas-adapter"),
            (other.zipped, "adas-adapter", folder),
            (other.evaluate, "adas-adapter", ["bf16"]),
            (other.push, "adas-adapter", "eve/loot", True, "hf_eve"),
        ):
            with pytest.raises(UserError, match="You have no training run or adapter"):
                attack(*arguments)
    assert folder.is_dir() and (public._work / "adas-run").is_dir()
    assert ADA not in "".join(p.read_text() for p in folder.parent.parent.rglob("*") if p.is_file())
    assert artifact.OWNER not in artifact._PUBLIC, "the digest of the owner would go into downloads"

    # Nor does a comparison run with it, and what it is called by is not told.
    monkeypatch.setattr(
        admission_module, "get_trainings", lambda: public
    )  # else this process's, which is private
    admission = Admission(public.settings)
    with pytest.raises(UserError, match="There is no adapter") as refused:
        admission.check_owner("adas-adapter", EVE)
    assert "adas" not in refused.value.advice
    admission.check_owner("adas-adapter", ADA)
    with pytest.raises(UserError, match="There is no adapter"):
        admission.admit(request("Hi", ["bf16"], None, ["adas-adapter"]), None)
    ada.remove("adas-adapter")
    assert not folder.exists()


def test_the_operators_login_is_not_lent(public, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_operators")
    trained(public, EVE, "eves")
    for token in (None, "", "  "):
        with pytest.raises(UserError, match="Uploading needs a token of yours"):
            public.seen_by(EVE).push("eves", "anybody/repo", token=token)


def test_visitors_have_limits(public):
    eve = public.seen_by(EVE)
    wanted = TrainRequest(DataSource("pirate"), "bf16", settings=SHORT)
    for bad, words in (
        (replace(wanted, output="/tmp/eve"), "folder of the server"),
        (replace(wanted, model="/etc"), "not accepted as a model"),
        (replace(wanted, base="gptq@/etc/x"), "not accepted as a checkpoint"),
        (replace(wanted, sample_prompt="x" * 200_000), "COMPARATOR_MAX_PROMPT_TOKENS"),
        (replace(wanted, system="x" * 100_000), "COMPARATOR_MAX_TRAINING_CHARACTERS"),
    ):
        with pytest.raises(UserError, match=words):
            eve.start(bad)
    with pytest.raises(UserError, match="no key"):
        public.seen_by(None).start(wanted)
    unfinished(public, EVE, "one")
    unfinished(public, EVE, "two")
    with pytest.raises(UserError, match="COMPARATOR_MAX_ADAPTERS"):
        eve._make_sure_of_room("address")


def test_a_file_that_unpacks_to_gigabytes_is_refused_in_a_bounded_process(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    bomb, settings = tmp_path / "bomb.parquet", Settings(public=True)
    column = pyarrow.DictionaryArray.from_arrays([0] * 5_000, ["x" * 1_000_000])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "completion": column}), bomb)
    assert bomb.stat().st_size < 1_000_000
    monkeypatch.setattr(strangers_data, "MEMORY_BYTES", 2e9)
    began = time.monotonic()
    with pytest.raises(UserError, match="memory|realloc|malloc|characters"):
        data.read(DataSource(str(bomb), uploaded=True), settings)
    assert time.monotonic() - began < 60, "it was not ended"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    assert len(data.read(DataSource(str(rows), uploaded=True), settings).samples) == 20
    rows.write_text('{"prompt": "a", "completion": "%s"}\n' % ("b" * 2_000_000))
    with pytest.raises(UserError, match="COMPARATOR_MAX_TRAINING_CHARACTERS"):
        data.read(DataSource(str(rows), uploaded=True), settings)


# ---------------------------------------------------------------- a stranger's model


@pytest.fixture
def hub_server(public, tmp_path, settings_env, monkeypatch):
    """A stand-in for the Hub with a small model of a stranger's, and this process as a public server."""
    settings_env(public=1, training=1, cache_dir=tmp_path / "cache", data_dir=tmp_path)
    with as_the_hub(tmp_path / "hf", monkeypatch) as server:
        tiny_models.save(tmp_path / "plain", "llama", chat=True)
        server.add("someone/model", tmp_path / "plain", parameters=100_000)
        # What would read a tokenizer in this process ends the test.
        monkeypatch.setattr(
            tokenizer, "read_tokenizer", lambda path: pytest.fail("it was read in this process")
        )
        yield server
    isolated.process.close()
    isolated.beside.close()


def test_a_strangers_model_is_trained_without_its_tokenizer_in_this_process(public, hub_server):
    eve = public.seen_by(EVE)
    preview = eve.preview(DataSource("pirate"), "someone/model", SHORT)
    assert preview.samples and preview.tokens.total
    job = eve.start(
        TrainRequest(DataSource("pirate"), "fp32", "someone/model", SHORT, sample_prompt="Hello"), "address"
    )
    events = list(public.events(job))
    assert isinstance(events[-1], Trained), events[-1]
    assert any(isinstance(e, Sample) and e.now for e in events)


def test_a_tokenizer_that_is_slow_on_data_ends_at_its_time_for_all_of_them(
    public, hub_server, tmp_path, monkeypatch
):
    plain, slow = tmp_path / "plain", tmp_path / "slow"
    rule = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    shutil.copytree(plain, slow)
    changed = json.loads((plain / "tokenizer.json").read_text())
    changed["normalizer"] = {
        "type": "Sequence",
        "normalizers": [rule] * 13,
    }  # a sample alone is within its limit
    (slow / "tokenizer.json").write_text(json.dumps(changed))
    hub_server.add("someone/slow", slow, parameters=100_000)
    monkeypatch.setattr(tokenize, "_CPU_S", 1.0)
    began_s = time.process_time()
    with pytest.raises(UserError, match="someone/slow takes"):
        public.seen_by(EVE).preview(DataSource("pirate"), "someone/slow", replace(SHORT, max_length=4096))
    assert time.process_time() - began_s < 20


def test_a_template_that_is_slow_for_each_sample_ends_at_the_time_for_all(
    public, hub_server, tmp_path, monkeypatch
):
    slow = tmp_path / "slow-template"
    shutil.copytree(tmp_path / "plain", slow)
    loop = "{% for a in range(300) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"
    template = (slow / "chat_template.jinja").read_text()
    (slow / "chat_template.jinja").write_text(loop + template)
    hub_server.add("someone/slow-template", slow, parameters=100_000)
    monkeypatch.setattr(tokenize, "_WALL_S", 0.5)
    with pytest.raises(UserError, match="takes longer than 0.5 s to tokenize"):
        public.seen_by(EVE).preview(DataSource("pirate"), "someone/slow-template", SHORT)
