"""AutoRound's checkpoints, packed by hand in the layouts of GPTQ and AWQ: loaded without the auto-round package, or refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import awq_models
import gptq_models
import pytest
import tiny_models

from comparator.backends import backend_for, resolve
from comparator.backends.autoround import layout
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.events import Done
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Cell
from comparator.engine.local import LocalEngine
from comparator.sources import open_checkpoint

ROUND = backend_for(resolve("autoround@x"))
CONFIG = {
    "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int", "autoround_version": "0.9.0",
    "block_name_to_quantize": "model.layers", "act_bits": 16,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoround")
    with gptq_models.settings_in(folder / "cache"):
        yield folder


@pytest.fixture(scope="module")
def engine(place):
    engine = LocalEngine()
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def tiny(place) -> Path:
    tiny_models.save(place / "tiny", "llama", hidden_size=64, intermediate_size=128)
    return place / "tiny"


def make(source: Path, target: Path, packing: str = "auto_round:auto_gptq", less: int = 1, **config):
    """(the checkpoint, what its weights mean); `sym`, `bits` and `group` are those of the weights."""
    own = {n: config.pop(n) for n in ("bits", "group", "sym", "kept") if n in config}
    own = {"group": 32, "sym": True, **own}
    pack = awq_models.stored if "awq" in packing else partial(awq_models.stored_as_gptq, less=less)
    meant = awq_models.quantized(source, target, pack=pack, **own)
    file = target / "config.json"
    values = json.loads(file.read_text())
    said = {n: v for n, v in values["quantization_config"].items() if n in ("bits", "group_size")}
    values["quantization_config"] = {**CONFIG, **said, "packing_format": packing, "sym": own["sym"], **config}
    file.write_text(json.dumps(values))
    return target, meant


def run(engine, model: Path, *variants: str):
    request = Request(
        str(model), tuple(Cell(resolve(v)) for v in variants), "The capital of France is", chat=False,
        settings=GenerationSettings(max_new_tokens=8), fidelity="none",
    )  # fmt: skip
    last = list(compare(request, engine=engine))[-1]
    assert isinstance(last, Done)
    return last.comparison


def meaning(tiny: Path, meant: dict):
    """A plain model with the weights that were packed."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for name, weight in meant.items():
        model.get_submodule(name).weight.data = torch.from_numpy(weight.copy())
    return model


def loaded(variant, tiny: Path):
    from comparator.backends.base import Placement

    return ROUND.load(open_checkpoint(str(tiny)), variant, Placement("cpu"), lambda *_: None)


@pytest.mark.parametrize(
    ("packing", "less", "settings"),
    [
        ("auto_round:auto_gptq", 1, {}),
        ("auto_round:auto_gptq", 0, {}),
        ("auto_round:gptq:exllamav2", 1, {"group": -1}),
        ("auto_round", 0, {"sym": False}),
        ("auto_round:auto_gptq", 1, {"sym": False, "bits": 8}),
        ("auto_round:auto_gptq", 1, {"bits": 2}),
        ("auto_round:auto_awq", 0, {}),
        ("auto_round:auto_awq", 0, {"sym": False}),
        ("auto_round:auto_awq", 0, {"sym": False, "kept": ("self_attn.k_proj",)}),
    ],
)
def test_the_weights_are_those_that_were_packed(tiny, tmp_path, packing, less, settings):
    import torch

    extra = {f"model.layers.{i}.{n}": {"bits": 16} for i in range(2) for n in settings.get("kept", ())}
    folder, meant = make(tiny, tmp_path / "made", packing, less, extra_config=extra or None, **settings)
    variant = ROUND.complete(resolve(f"autoround@{folder}:kernel=torch"), open_checkpoint(str(tiny)))
    model = loaded(variant, tiny).model
    for name, weight in meant.items():
        module = model.get_submodule(name)
        assert torch.allclose(ROUND.dequantize(module), torch.from_numpy(weight), atol=1e-3), name
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected, got = meaning(tiny, meant)(ids).logits, model(ids).logits.float()
    assert (got - expected).abs().max() < 0.02 * expected.abs().max(), "beyond what fp16 rounds"


@pytest.mark.parametrize(
    ("packing", "kernel", "class_name"),
    [
        ("auto_round:auto_gptq", "auto", "TorchAtenLinear"),
        ("auto_round:auto_gptq", "torch", "TorchLinear"),
        ("auto_round:auto_awq", "auto", "TorchAtenAwqLinear"),
        ("auto_round:auto_awq", "torch", "AwqTorchLinear"),
    ],
)
def test_the_column_and_its_code(tiny, tmp_path, engine, packing, kernel, class_name):
    from comparator.reporting.snippet import snippet

    folder, meant = make(tiny, tmp_path / "made", packing, less=1, quant_method="intel/auto-round")
    comparison = run(engine, tiny, f"autoround@{folder}:kernel={kernel}")
    column = comparison.cells[0]
    assert column.status == "ok", column.error
    assert column.variant == f"autoround@{folder}:g32" + (",kernel=torch" if kernel == "torch" else "")
    assert column.kernel == f"gptqmodel {class_name}"
    rows = [r for r in column.layers if r.name.endswith(".qweight")]
    assert len(rows) == len(meant) and {r.logical_dtype for r in rows} == {"int4 (AutoRound)"}
    assert {r.name: r.shape for r in rows} == {f"{n}.qweight": w.shape for n, w in meant.items()}
    held = column.memory.loaded_weight_bytes + column.memory.loaded_quant_state_bytes
    needed = ROUND.needed_bytes(resolve(column.variant), open_checkpoint(str(tiny)))
    assert abs(needed - held) < 0.03 * held
    if class_name == "TorchLinear":
        return  # gptqmodel compiles it outside of this project, for half a minute
    names: dict = {}
    exec(compile(snippet(column, comparison), "code", "exec"), names)
    assert tuple(names["new_tokens"]) == column.token_ids


def test_shards_are_linked_not_copied(tiny, tmp_path):
    folder, _ = make(tiny, tmp_path / "made")
    variant = ROUND.complete(resolve(f"autoround@{folder}"), open_checkpoint(str(tiny)))
    _, inner = ROUND._by_layout(variant)
    files = sorted(Path(inner.source).glob("*.safetensors"))
    assert files[0].resolve() == folder / "model.safetensors" and len(files) == 2
    assert files[1].stat().st_size < 0.1 * files[0].stat().st_size, "g_idx alone"


def refused(action, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert caught.value.advice
    for word in words:
        assert word in str(caught.value), f"“{word}” is missing from: {caught.value}"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data_type": "mx_fp"}, ["mx_fp", "auto-round package"]),
        ({"act_bits": 8}, ["act_bits=8"]),
        ({"packing_format": "auto_round:fp8"}, ["fp8"]),
        ({"packing_format": "auto_round:llm_compressor"}, ["llm_compressor"]),
    ],
    ids=str,
)
def test_what_takes_the_package_is_refused(tiny, tmp_path, config, words):
    folder, _ = make(tiny, tmp_path / "made", **config)
    refused(lambda: layout.read(open_checkpoint(str(folder))), *words)


def test_other_sources_and_settings_are_refused(tiny, tmp_path):
    model, (folder, _) = open_checkpoint(str(tiny)), make(tiny, tmp_path / "made")
    refused(lambda: ROUND.complete(resolve(f"autoround@{tiny}"), model), "not quantized")
    refused(lambda: ROUND.complete(resolve(f"autoround@{folder}:iters=50"), model), "iters=50")
    refused(lambda: ROUND.complete(resolve(f"autoround@{folder}:8bit"), model), "bits=8", "bits=4")
    refused(lambda: ROUND.complete(resolve(f"autoround@{folder}:sym=false"), model), "sym=false")
    refused(
        lambda: backend_for(resolve("gptq")).complete(resolve(f"gptq@{folder}"), model), f"autoround@{folder}"
    )


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq"])
def test_layers_with_settings_of_their_own_are_refused(tiny, tmp_path, packing):
    import torch

    folder, _ = make(tiny, tmp_path / "made", packing)
    name = "model.layers.1.mlp.up_proj"
    pack = awq_models.stored if "awq" in packing else awq_models.stored_as_gptq
    parts, _ = pack(torch.randn(128, 64), 8, 32, True)
    awq_models.rewrite(folder, lambda t: {**t, **{f"{name}.{n}": v for n, v in parts.items()}})
    refused(lambda: ROUND.settings(open_checkpoint(str(folder)), resolve(f"autoround@{folder}")), name)
