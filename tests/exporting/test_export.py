"""Exported variants on a real model of two layers: plain transformers and this program load them, with the column's tokens."""

from __future__ import annotations

import importlib.util
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import stored_formats as formats
import tiny_models

from comparator.backends import all_backends, resolve
from comparator.core import document
from comparator.core.errors import Stopped, UserError
from comparator.core.variant import parse_adapter
from comparator.exporting import ExportRequest, export

# Of each method that is made on a CPU; gptq and awq are quantized in tests of their own.
VARIANTS = ("fp32", "bf16", "fp16", "int8", "int8:threshold=0", "nf4", "nf4:dq", "nf4:skip=q_proj+model.layers.1.mlp", "fp4:compute=fp16",
            "torchao", "torchao:group=64,scheme=intx4", "hqq", "hqq:3bit,g32", "gguf:q8_0")  # fmt: skip


@pytest.fixture(scope="module")
def columns(own_engine, two_layers):
    """`columns(variant)`: the column before anything was exported."""
    made = {}

    def one(variant: str):
        if variant not in made:
            (made[variant],) = formats.run(own_engine, two_layers, [variant]).cells
            own_engine.unload()
        assert made[variant].status == "ok", made[variant].error
        return made[variant]

    return one


def exported(own_engine, model: Path, variant: str, target: Path, **more):
    return export(own_engine, ExportRequest(str(model), resolve(variant), target, **more))


def plain(folder: Path):
    """As a person loads it with plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_exported_gives_the_tokens_of_the_column(own_engine, two_layers, columns, tmp_path, variant):
    if variant.startswith("hqq") and importlib.util.find_spec("hqq") is None:
        pytest.skip("hqq is in requirements-formats.txt")
    made = exported(own_engine, two_layers, variant, tmp_path / "made")
    tokens = columns(variant).token_ids
    if "transformers" in made.loaded_by:
        assert formats.generated(plain(made.folder), made.folder) == tokens, "in plain transformers"
    if "@" not in made.notation:
        (again,) = formats.run(own_engine, made.folder, [variant]).cells
    else:
        (again,) = formats.run(own_engine, two_layers, [made.notation]).cells
    assert again.status == "ok", again.error
    assert again.token_ids == tokens, f"loaded again as {made.notation}"
    assert again.memory.weight_bytes == columns(variant).memory.weight_bytes
    text = "".join(f.read_text() for f in made.folder.iterdir() if f.suffix in (".json", ".md"))
    assert str(two_layers) not in text, "a path of this machine is in the files"
    own_engine.unload()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gptq:4bit,g64,kernel=torch_aten", "awq:g64"])
def test_what_gptqmodel_makes_gives_the_tokens_of_the_column(
    own_engine, two_layers, columns, tmp_path, variant
):
    made = exported(own_engine, two_layers, variant, tmp_path / "made")
    kernel = ":kernel=torch_aten" if "kernel=" in variant else ""
    (again,) = formats.run(own_engine, two_layers, [f"{made.notation}{kernel}"]).cells
    assert again.token_ids == columns(variant).token_ids, again.error


@pytest.mark.parametrize("variant", ["bf16", "nf4", "torchao"])
def test_an_adapter_is_merged(own_engine, two_layers, tmp_path, variant, adapter):
    (column,) = formats.run(own_engine, two_layers, [variant], f"{adapter}:merged").cells
    own_engine.unload()
    made = exported(own_engine, two_layers, variant, tmp_path / "made", adapter=parse_adapter(str(adapter)))
    assert formats.generated(plain(made.folder), made.folder) == column.token_ids
    assert "with lora merged" in (made.folder / "README.md").read_text()


@pytest.mark.parametrize("variant", ["hqq", "gguf", "gptq"])
def test_where_it_cannot_be_merged_a_way_out_is_named(own_engine, two_layers, tmp_path, variant, adapter):
    with pytest.raises(UserError) as caught:
        exported(own_engine, two_layers, variant, tmp_path / "made", adapter=parse_adapter(str(adapter)))
    assert "lora" in str(caught.value) and "bf16" in caught.value.advice
    assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def adapter(two_layers, tmp_path_factory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).save_pretrained(folder)
    return folder


def test_a_ready_made_checkpoint_is_copied_and_a_compute_dtype_stays(own_engine, two_layers, tmp_path):
    first = exported(own_engine, two_layers, "nf4", tmp_path / "first")
    again = exported(own_engine, two_layers, first.notation, tmp_path / "again")
    assert (again.folder / "model.safetensors").read_bytes() == (
        first.folder / "model.safetensors"
    ).read_bytes()
    other = exported(own_engine, two_layers, f"{first.notation}:compute=fp32", tmp_path / "other")
    config = json.loads((other.folder / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"


def test_the_model_card_carries_what_was_measured(own_engine, two_layers, tmp_path):
    comparison = formats.run(own_engine, two_layers, ["bf16", "nf4"])
    comparison = document.loads(document.dumps(replace(comparison, id="abc")))
    made = exported(
        own_engine,
        two_layers,
        "nf4",
        tmp_path / "made",
        comparison=comparison,
        link="https://example.org/?c=abc",
    )
    card = (made.folder / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("---\n")
    assert "4-bit" in front and "bitsandbytes" in front and "base_model:" not in front, "a folder is no repo"
    nf4 = comparison.cells[1]
    assert f"| resident, MB ↓ | {nf4.memory.resident_bytes / 1e6:.3g}" in body.replace("\\", ""), body
    for words in ("transformers 5", "https://example.org/?c=abc", comparison.created_at[:10], "(reference)"):
        assert words in body.replace("\\", ""), words
    assert formats.PROMPT not in card, "the prompt is the person's own"
    with pytest.raises(UserError, match="no measured variant int8"):
        exported(own_engine, two_layers, "int8", tmp_path / "other", comparison=comparison)


def test_nothing_of_a_person_s_is_overwritten(own_engine, two_layers, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError):
            exported(own_engine, two_layers, "bf16", tmp_path / "mine", force=force)
    exported(own_engine, two_layers, "bf16", tmp_path / "made")
    with pytest.raises(UserError, match="already exists"):
        exported(own_engine, two_layers, "fp16", tmp_path / "made")
    exported(own_engine, two_layers, "fp16", tmp_path / "made", force=True)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "float16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "mine"], "something temporary was left"


def test_stop_and_a_full_disk_leave_nothing(own_engine, two_layers, tmp_path, monkeypatch):
    stop = threading.Event()

    def on_progress(fraction, message):
        if "Loading" in message or "writing" in message:
            stop.set()

    with pytest.raises(Stopped):
        export(
            own_engine, ExportRequest(str(two_layers), resolve("nf4"), tmp_path / "made"), stop, on_progress
        )
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="free"):
        exported(own_engine, two_layers, "nf4", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_server_is_refused_by_name(own_engine, two_layers, tmp_path):
    with pytest.raises(UserError, match="on the server"):
        exported(own_engine, two_layers, "endpoint@http://127.0.0.1:9/v1", tmp_path / "made")


def test_models_with_biases_and_a_head_of_their_own(own_engine, tmp_path):
    """hqq's layout is written here: of what the two-layer model has not."""
    pytest.importorskip("hqq")
    tiny_models.save(tmp_path / "tiny", "qwen2", hidden_size=64, intermediate_size=128, dtype="bfloat16",
                     tie_word_embeddings=False)  # fmt: skip
    (column,) = formats.run(own_engine, tmp_path / "tiny", ["hqq:kernel=unpack"]).cells
    made = exported(own_engine, tmp_path / "tiny", "hqq:kernel=unpack", tmp_path / "made")
    (again,) = formats.run(own_engine, tmp_path / "tiny", [f"{made.notation}:kernel=unpack"]).cells
    assert again.token_ids == column.token_ids, again.error


def test_every_backend_says_who_loads_it():
    known = {"transformers", "vLLM", "llama.cpp"}
    assert all(set(b.loaded_by) <= known for b in all_backends())
