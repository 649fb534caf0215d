"""torchao on real weights: the built-in model cut to two layers, quantized by us and by plain transformers, saved by plain
transformers and loaded by us; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
from torchao_models import AO, CPU, NEW, ON_CPU, PROMPT, generated, plain, quantized

from comparator import api
from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.backends.torchao.schemes import SCHEMES, config
from comparator.comparison import runner
from comparator.core.errors import UserError
from comparator.metrics import layers
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint, packed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
READY = {
    "torchao:scheme=int8dyn": ":scheme=int8dyn",
    "torchao": "",
    "torchao:group=64,scheme=intx4": ":group=64,scheme=intx4",
    "torchao:group=tensor,scheme=fp8": ":group=tensor,scheme=fp8",
}
# The columns of the two comparisons.
ON_THE_SPOT = [
    "torchao:group=64",
    "torchao:scheme=int8dyn",
    "torchao:group=64,scheme=intx4",
    "torchao:scheme=fp8",
]
COLUMNS = [*ON_THE_SPOT, *(f"ready {n}" for n in READY)]


@pytest.fixture(scope="module")
def saved(two_layers, models, tmp_path_factory) -> dict[str, Path]:
    """By notation: the checkpoint that plain transformers saves."""
    folders = {}
    for number, notation in enumerate(READY):
        folders[notation] = tmp_path_factory.mktemp("torchao") / f"saved-{number}"
        models[notation].save_pretrained(folders[notation])
        for file in two_layers.glob("*token*"):
            shutil.copy(file, folders[notation])
    return folders


@pytest.fixture(scope="module")
def comparison(two_layers, saved, own_engine):
    """bf16, what is made on the spot and what is ready-made, in two comparisons on one engine."""
    ready = [f"torchao@{folder}" for folder in saved.values()]
    made = []
    for variants in (["bf16", *ON_THE_SPOT], ready):
        request = api.request(
            PROMPT, variants, str(two_layers), max_new_tokens=NEW, fidelity="none", chat=False
        )
        made.append(runner.run(request, engine=own_engine, emit=lambda event: None))
        own_engine.unload()
    return made


@pytest.fixture(scope="module")
def columns(comparison, saved):
    on_the_spot, ready = ({c.variant: c for c in made.cells} for made in comparison)
    found = {n: on_the_spot[n] for n in ("bf16", *ON_THE_SPOT)}
    for notation, folder in saved.items():
        found[f"ready {notation}"] = next(c for n, c in ready.items() if str(folder) in n)
    return found


# ---------------------------------------------------------------- notation


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("torchao:scheme=int8", "torchao"),
        ("torchao:dtype=bf16,scheme=fp8", "torchao:scheme=fp8"),
        ("torchao:scheme=int4,group=64", "torchao:group=64,scheme=int4"),
        ("torchao@me/repo@main:scheme=int8", "torchao@me/repo@main:scheme=int8"),
    ],
)
def test_one_notation_means_one_thing(written, canonical):
    assert resolve(written).notation == canonical and resolve(canonical) == resolve(written)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("torchao:scheme=int3", ["int3", "intx4"]),
        ("torchao:scheme=int4,group=row", ["int4", "group=row", "256, 128, 64, 32"]),
        ("torchao:scheme=int8dyn,group=64", ["int8dyn", "group=64", "row, tensor"]),
        ("torchao:scheme=int8dyn,dtype=fp16", ["int8dyn", "dtype=fp16", "bf16, fp32"]),
        ("torchao:scheme=int4,dtype=fp16", ["int4", "dtype=fp16", "bf16"]),
        ("torchao:scheme=intx4,group=tensor", ["intx4", "group=tensor"]),
    ],
)
def test_a_combination_that_torchao_lacks_is_refused_by_name(written, words):
    with pytest.raises(UserError) as caught:
        resolve(written)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_model_fills_in_the_group(checkpoint):
    assert AO.complete(resolve("torchao:scheme=int4"), checkpoint).notation == "torchao:group=64,scheme=int4"
    assert AO.complete(resolve("torchao:group=row"), checkpoint).notation == "torchao"
    assert (
        AO.complete(resolve("torchao:scheme=intx4,group=row"), checkpoint).notation
        == "torchao:group=row,scheme=intx4"
    )
    with pytest.raises(UserError) as caught:
        AO.complete(resolve("torchao:scheme=int4,group=128"), checkpoint)
    said = str(caught.value)
    assert "128" in said and "576" in said and "_proj" in said and "64, 32" in said


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_the_config_and_its_source_text_are_the_same(scheme):
    import torch
    import torchao.quantization as ao

    for group in scheme.groups:
        variant = resolve(f"torchao:scheme={scheme.name},group={group}")
        imports, setup, arguments = AO.code(variant, CPU)
        scope = {"torch": torch}
        exec("\n".join([*imports, *setup]), scope)
        assert scope["quantization"].quant_type == config(scheme, group)
        assert isinstance(scope["quantization"].quant_type, getattr(ao, scheme.config))
        assert arguments == ["dtype=torch.bfloat16", "quantization_config=quantization"]


# ---------------------------------------------------------------- what is loaded, against plain transformers


@pytest.mark.parametrize("notation", COLUMNS)
def test_tokens_are_those_of_plain_transformers(columns, models, ids, notation):
    column = columns[notation]
    assert column.status == "ok", column.error
    assert column.token_ids == generated(models[notation.removeprefix("ready ")], ids)
    assert column.kernel.startswith("torchao ")


@pytest.mark.parametrize("notation", COLUMNS)
def test_rows_add_up_to_the_tensors_of_plain_transformers(columns, models, notation):
    column, model = columns[notation], models[notation.removeprefix("ready ")]
    _, group, logical, compute = ON_CPU[notation.removeprefix("ready ")]
    rows = {row.name: row for row in column.layers}
    tensors = quantized(model)
    assert len(tensors) == 14, "seven linear layers in each of two blocks, and no head"
    for name, tensor in tensors.items():
        row = rows[name]
        parts = [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
        assert row.bytes + row.quant_state_bytes == sum(p.numel() * p.element_size() for p in parts)
        assert row.bytes == tensor.qdata.numel() and (row.logical_dtype, row.compute_dtype) == (
            logical,
            compute,
        )
        assert row.shape == tuple(tensor.shape) and row.param_class == type(tensor).__name__
        assert row.bits_per_weight == pytest.approx(8 * (row.bytes + row.quant_state_bytes) / tensor.numel())
        scales = {"row": row.shape[0], "tensor": 1}.get(group) or row.shape[0] * row.shape[1] // int(group)
        assert next(s for s in row.state if s.name == "scale").shape[0] * row.state[0].shape[1] == scales
    others = [p for n, p in model.named_parameters() if n not in tensors]
    assert column.memory.weight_bytes == sum(r.bytes for r in column.layers)
    assert sum(r.bytes for r in column.layers if r.name not in tensors) == sum(
        p.numel() * p.element_size() for p in others
    )
    assert rows["lm_head.weight"].tied_to == "model.embed_tokens.weight"


@pytest.mark.parametrize("notation", COLUMNS)
def test_needed_bytes_are_what_is_resident(columns, checkpoint, notation):
    column = columns[notation]
    held = sum(r.bytes + r.quant_state_bytes for r in column.layers)
    assert AO.needed_bytes(resolve(column.variant), checkpoint) == pytest.approx(held, rel=0.001)


@pytest.mark.parametrize("notation", ["torchao:group=64,scheme=intx4", "torchao:scheme=fp8", "ready torchao"])
def test_the_copied_code_gives_the_same_tokens(columns, comparison, notation):
    copied: dict = {}
    exec(snippet(columns[notation], comparison[notation.startswith("ready")]), copied)
    assert tuple(copied["new_tokens"]) == columns[notation].token_ids


@pytest.mark.parametrize("notation", ON_CPU)
def test_dequantized_is_what_the_stored_numbers_mean(models, notation):
    import torch

    for module in models[notation].modules():
        if (unpacked := AO.dequantize(module)) is None:
            continue
        weight = module.weight
        assert torch.equal(unpacked, weight.dequantize().float())
        scale = weight.scale.float()
        if scale.numel() > 1:
            scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        meant = weight.qdata.float() * scale  # all are symmetric: the zero points are 0
        assert torch.allclose(unpacked, meant, rtol=2**-7, atol=1e-6)
        assert not torch.any(getattr(weight, "zero_point", torch.zeros(1)))
    assert AO.dequantize(models[notation].lm_head) is None


def test_made_from_the_resident_bf16_column(columns):
    assert any("resident weights of bf16" in note for note in columns["torchao:scheme=fp8"].notes)


def test_a_byte_for_each_4_bits_is_said(columns):
    assert any("a byte of its own" in n for n in columns["torchao:group=64,scheme=intx4"].notes)
    assert not any("a byte of its own" in n for n in columns["torchao:scheme=fp8"].notes)


def test_nothing_stays_mapped_to_the_file(saved, checkpoint):
    variant = AO.complete(resolve(f"torchao@{saved['torchao']}"), checkpoint)
    model = AO.load(checkpoint, variant, CPU, lambda *_: None).model
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not list what is mapped")
    mapped = [
        line.split()[0].split("-") for line in maps.read_text().splitlines() if str(saved["torchao"]) in line
    ]
    for name, tensor in quantized(model).items():
        for part in (tensor.qdata, tensor.scale, tensor.zero_point):
            inside = any(int(start, 16) <= part.data_ptr() < int(end, 16) for start, end in mapped)
            assert not inside, f"deleting the checkpoint would pull {name} away"


@pytest.mark.parametrize(
    ("scheme", "dtype", "long"), [("int8", "fp32", "float32"), ("fp8", "fp16", "float16")]
)
def test_other_dtypes_of_the_activations(two_layers, checkpoint, ids, scheme, dtype, long):
    variant = AO.complete(resolve(f"torchao:dtype={dtype},scheme={scheme}"), checkpoint)
    model = AO.load(checkpoint, variant, CPU, lambda *_: None).model
    assert {r.logical_dtype for r in layers.rows(model, AO)} == {f"{scheme} (torchao)", dtype}
    assert generated(model, ids) == generated(plain(two_layers, scheme, "row", long), ids)


# ---------------------------------------------------------------- ready-made checkpoints that are refused


def altered(folder: Path, target: Path, **changes) -> str:
    """A copy whose config.json says otherwise."""
    shutil.copytree(folder, target)
    written = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**written, **changes}))
    return str(target)


def recipe(name: str, **data) -> dict:
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}},
    }


def refused(source: str, checkpoint, options: str = "") -> str:
    with pytest.raises(UserError) as caught:
        AO.complete(resolve(f"torchao@{source}{options}"), checkpoint)
    assert caught.value.advice
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [(":scheme=int8", ["scheme=int8", "scheme=intx4"]), (":group=32", ["group=32", "group=64"]),
     (":dtype=fp16", ["dtype=fp16", "dtype=bf16"])],
)  # fmt: skip
def test_an_option_that_contradicts_the_checkpoint_is_named(saved, checkpoint, options, words):
    said = refused(str(saved["torchao:group=64,scheme=intx4"]), checkpoint, options)
    assert all(word in said for word in words), said


def test_the_checkpoint_decides_the_options(saved, checkpoint):
    for notation, options in READY.items():
        for written in ("", options):
            variant = AO.complete(resolve(f"torchao@{saved[notation]}{written}"), checkpoint)
            assert variant.notation.endswith(f"{saved[notation].name}{options}")
            assert resolve(variant.notation) == variant


def test_sources_that_are_no_torchao_checkpoint_of_this_model(two_layers, saved, checkpoint, tmp_path):
    assert "not quantized" in refused(str(two_layers), checkpoint)
    other = altered(
        saved["torchao"], tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    said = refused(other, checkpoint)
    assert "gptq, not torchao" in said and "gptq@" in said
    tiny_models.save(tmp_path / "tiny", "llama", chat=True, dtype="bfloat16")
    plain(tmp_path / "tiny", "int8", "row").save_pretrained(tmp_path / "small")
    tiny_models.tokenizer().save_pretrained(tmp_path / "small")
    said = refused(str(tmp_path / "small"), checkpoint)
    assert "hidden_size 32" in said and "576" in said


def test_another_recipe_or_layout_is_refused_by_name(saved, checkpoint, tmp_path):
    for name, data, word in (
        ("Int8DynamicActivationIntxWeightConfig", {}, "Int8DynamicActivationIntxWeightConfig"),
        ("IntxWeightOnlyConfig", {"weight_dtype": {"_type": "torch.dtype", "_data": "int3"}}, "int3"),
    ):
        folder = altered(saved["torchao"], tmp_path / word, quantization_config=recipe(name, **data))
        assert word in refused(folder, checkpoint)
    old = altered(
        saved["torchao"],
        tmp_path / "old",
        quantization_config={"quant_method": "torchao", "quant_type": "int8_weight_only"},
    )
    assert "int8_weight_only" in refused(old, checkpoint)


def test_files_without_torchaos_metadata_are_refused(saved, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(altered(saved["torchao"], tmp_path / "bare"))
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert "metadata" in refused(str(folder), checkpoint)


def test_a_missing_scale_is_noticed_before_loading(saved, two_layers):
    """What lies beside the weights is not taken for a weight, and the packed weight stands for the parameter."""
    opened = open_checkpoint(str(saved["torchao"]))
    name = "model.layers.0.mlp.down_proj"
    info = next(t for t in opened.tensors if t.name == f"{name}._weight_qdata")
    assert packed.parameter(info, opened.quantization) == (f"{name}.weight", (576, 1536))
    assert packed.is_state(f"{name}._weight_zero_point", opened.quantization)
    assert opened.parameters == open_checkpoint(str(two_layers)).parameters


@pytest.mark.parametrize(("family", "word"), [("gpt2", "no linear layer"), ("mamba", "MambaForCausalLM")])
def test_architectures_that_it_cannot_quantize_are_refused_before_loading(family, word, tmp_path):
    tiny_models.save(tmp_path, family, dtype="bfloat16")
    with pytest.raises(UserError, match=word):
        AO.complete(resolve("torchao"), open_checkpoint(str(tmp_path)))


def test_shards_another_group_size_and_a_quantized_head(tmp_path):
    """Read from the metadata of several files; the layer rows know what is in the head too."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny_models.save(tmp_path / "tiny", "qwen2", chat=True, dtype="bfloat16", tie_word_embeddings=False)
    recipe = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "tiny", dtype=torch.bfloat16, device_map={"": "cpu"},
        quantization_config=TorchAoConfig(recipe, include_input_output_embeddings=True),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    tiny_models.tokenizer(chat=True).save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    opened = open_checkpoint(str(tmp_path / "tiny"))
    variant = AO.complete(resolve(f"torchao@{tmp_path / 'saved'}"), opened)
    assert variant.notation.endswith(":scheme=intx4"), "the notation has no groups of 16"
    loaded = AO.load(opened, variant, CPU, lambda *_: None)
    assert any("groups have 16 weights" in note for note in loaded.notes)
    rows = {r.name: r for r in layers.rows(loaded.model, AO)}
    assert (rows["lm_head.weight"].logical_dtype, rows["model.embed_tokens.weight"].logical_dtype) == (
        "intx4 (torchao)",
        "bf16",
    )
    held = sum(r.bytes + r.quant_state_bytes for r in rows.values())
    assert AO.needed_bytes(variant, opened) == held
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("notation", ["torchao", "torchao:scheme=fp8", "hqq"])
def test_a_part_in_main_memory_beside_a_gpu_is_refused(checkpoint, notation):
    """accelerate moves weights to the GPU at each use, which packed tensors do not take part in."""
    backend, variant = backend_for(resolve(notation)), resolve(notation)
    spread = Placement("cuda:0", {0: 70_000_000, "cpu": 10**9})
    with pytest.raises(UserError, match="main memory"):
        backend.load(checkpoint, backend.complete(variant, checkpoint), spread, lambda *_: None)
