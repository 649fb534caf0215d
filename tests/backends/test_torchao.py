"""torchao on real weights: the built-in model cut to two layers, quantized by us and by plain transformers, saved by plain
transformers and loaded by us; what is refused; and the layouts for CUDA without their kernels."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import threading
from pathlib import Path

import pytest
import tiny_models

from comparator import api
from comparator.backends import backend_for, resolve, row_matmul
from comparator.backends.base import AdapterKind, Placement
from comparator.backends.torchao import int8_row
from comparator.backends.torchao.schemes import BY_NAME, SCHEMES, config
from comparator.comparison import runner
from comparator.core.errors import UserError
from comparator.core.messages import LoadRequest
from comparator.core.request import GenerationSettings
from comparator.core.variant import parse_adapter
from comparator.metrics import layers
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint, packed
from comparator.training import memory_estimate
from comparator.training.settings import TrainSettings
from comparator.util.compat.torch import plain_tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
AO = backend_for(resolve("torchao"))
PROMPT = "The capital of France is"
NEW = 4
CPU = Placement("cpu")
# scheme, group that loads without the option, logical dtype, compute dtype, classes of weights
ON_CPU = {
    "torchao": ("int8", "row", "int8 (torchao)", "bf16"),
    "torchao:group=64": ("int8", "64", "int8 (torchao)", "bf16"),
    "torchao:scheme=int8dyn": ("int8dyn", "row", "int8 (torchao)", "int8"),
    "torchao:group=64,scheme=intx4": ("intx4", "64", "intx4 (torchao)", "bf16"),
    "torchao:scheme=fp8": ("fp8", "row", "fp8 (torchao)", "bf16"),
    "torchao:group=tensor,scheme=fp8": ("fp8", "tensor", "fp8 (torchao)", "bf16"),
}
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


def plain(folder: Path, scheme: str, group: str, dtype: str = "bfloat16"):
    """The model as transformers alone loads it with torchao's config."""
    import torch
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = TorchAoConfig(config(BY_NAME[scheme], group))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map={"": "cpu"}, quantization_config=quantization
    ).eval()


def generated(model, ids: tuple[int, ...]) -> tuple[int, ...]:
    import torch

    given = torch.tensor([ids])
    out = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False
    )
    return tuple(out[0].tolist())[len(ids) :]


@pytest.fixture(scope="module")
def models(two_layers):
    """By notation: the model of plain transformers."""
    return {notation: plain(two_layers, *ON_CPU[notation][:2]) for notation in ON_CPU}


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


@pytest.fixture(scope="module")
def ids(two_layers, own_engine) -> tuple[int, ...]:
    own_engine.open(str(two_layers), threading.Event())
    return tuple(own_engine.encode(str(two_layers), PROMPT, None, False).token_ids)


@pytest.fixture
def checkpoint(two_layers):
    return open_checkpoint(str(two_layers))


def quantized(model) -> dict:
    """Name → torchao tensor."""
    return {n: p for n, p in model.named_parameters() if type(p).__module__.startswith("torchao")}


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


# ---------------------------------------------------------------- for CUDA only: all but the kernel


@pytest.mark.parametrize(("scheme", "way"), [("int4", "intx4"), ("fp8dyn", "scheme=fp8")])
def test_cuda_only_schemes_are_refused_on_a_cpu_before_loading(checkpoint, scheme, way, monkeypatch):
    variant = AO.complete(resolve(f"torchao:scheme={scheme}"), checkpoint)
    with pytest.raises(UserError, match=f"{scheme} runs on CUDA only") as caught:
        AO.prepare(checkpoint, variant, CPU, lambda *_: None)
    assert way in caught.value.advice


def tiled(outputs: int, inputs: int, group: int):
    """A weight in tinygemm's layout, which only CUDA can fill: random codes, scales and zero points of the right shapes."""
    import torch
    from torchao.quantization import Int4TilePackedTo4dTensor

    rows, columns = -(-outputs // 8) * 8, -(-inputs // 1024) * 1024
    codes = torch.randint(-(2**31), 2**31 - 1, (rows // 8, columns // 128, 32, 4), dtype=torch.int32)
    scales = torch.rand(columns // group, rows, 2).to(torch.bfloat16)
    return Int4TilePackedTo4dTensor(codes, scales, [1, group], torch.Size((outputs, inputs)))


@pytest.fixture(scope="module")
def int4(two_layers, tmp_path_factory) -> Path:
    """A checkpoint in tinygemm's layout."""
    import torch

    folder = tmp_path_factory.mktemp("torchao") / "int4"
    model = plain(two_layers, "int8", "row")
    for name in quantized(model):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight = torch.nn.Parameter(tiled(*module.weight.shape, 64), requires_grad=False)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.config.quantization_config.quant_type = config(BY_NAME["int4"], "64")
    model.save_pretrained(folder)
    for file in two_layers.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_a_checkpoint_in_tinygemms_layout_without_its_kernel(int4, checkpoint):
    """Its options, bytes and layer rows; 576 inputs are padded to 1,024."""
    variant = AO.complete(resolve(f"torchao@{int4}"), checkpoint)
    assert variant.notation.endswith(":group=64,scheme=int4")
    with pytest.raises(UserError, match="int4 runs on CUDA only"):
        AO.load(checkpoint, variant, CPU, lambda *_: None)
    model = AO.load_opened(variant, CPU, lambda *_: None, dtype="bf16")
    rows = {row.name: row for row in layers.rows(model, AO)}
    row = rows["model.layers.0.self_attn.k_proj.weight"]
    assert (row.logical_dtype, row.storage_dtype, row.compute_dtype) == ("int4 (torchao)", "int32", "bf16")
    assert row.shape == (192, 576) and row.storage_shape == (24, 8, 32, 4) and row.bytes == 192 * 1024 // 2
    assert row.quant_state_bytes == 1024 // 64 * 192 * 2 * 2
    assert [s.name for s in row.state] == ["scale and zero point"]
    held = sum(r.bytes + r.quant_state_bytes for r in rows.values())
    assert AO.needed_bytes(variant, checkpoint) == held
    assert AO.needed_bytes(resolve("torchao:scheme=int4"), checkpoint) == held
    assert all(AO.on_parallel_streams(m) for m in model.modules() if AO.owns(m))


def test_fp8_with_rounded_activations_without_its_kernel(two_layers):
    import torch
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    model = plain(two_layers, "fp8", "row")
    for module in model.modules():
        if AO.owns(module):
            rounding = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
            weight = Float8Tensor.from_hp(module.weight.dequantize(), granularity=PerRow(), act_quant_kwargs=rounding,
                                          mm_config=Float8MMConfig(use_fast_accum=True))  # fmt: skip
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    rows = layers.rows(model, AO)
    assert {r.compute_dtype for r in rows if r.name.endswith("proj.weight")} == {"fp8"}
    held = sum(r.bytes + r.quant_state_bytes for r in rows)
    assert AO.needed_bytes(resolve("torchao:scheme=fp8dyn"), open_checkpoint(str(two_layers))) == held


# ---------------------------------------------------------------- one row in a CUDA graph


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_of_int8_with_rounded_activations_is_torchaos_own(models, bias):
    import torch

    torch.manual_seed(0)
    for module in models["torchao:scheme=int8dyn"].model.layers[0].mlp.children():
        if not AO.owns(module):
            continue
        module = copy.copy(module)
        if bias:
            module.bias = torch.nn.Parameter(torch.randn(module.out_features, dtype=torch.bfloat16))
        x = torch.randn(1, 1, module.in_features, dtype=torch.bfloat16)
        forward = AO.capture_forward(module)
        with torch.inference_mode():
            assert torch.equal(forward(x), module(x))
        assert AO.graph_refusal(module) is None


def test_a_step_with_it_is_captured_and_checked(two_layers, checkpoint, ids):
    """As on CUDA, but for the graph itself."""
    from comparator.decoding.planner import record
    from comparator.decoding.static_state import StaticDecodeState

    model = AO.load(checkpoint, resolve("torchao:scheme=int8dyn"), CPU, lambda *_: None).model
    _, notes, check = record(model, StaticDecodeState(model, 64), list(ids), compiled=False, greedy=True)
    assert int8_row.NOTE in notes
    assert check.layers == 0.0 and check.wrong is None and check.first_difference is None


def test_what_no_graph_can_hold_says_so(models):
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, MappingType, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    quantize_(
        layer,
        Int8DynamicActivationInt8WeightConfig(
            act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False
        ),
    )
    assert "asymmetric" in AO.graph_refusal(layer[0]) and AO.capture_forward(layer[0]) is None
    own = models["torchao"].model.layers[0].mlp.up_proj
    assert AO.graph_refusal(own) is None and AO.capture_note(own) == row_matmul.NOTE
    assert not int8_row.rounds_activations(own.weight) and not AO.owns(models["torchao"].lm_head)


# ---------------------------------------------------------------- adapters and training


@pytest.fixture(scope="module")
def lora(two_layers, tmp_path_factory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("torchao") / "lora"
    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.2
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("notation", "merged"),
    [
        ("torchao:scheme=int8dyn", ""),
        ("torchao:group=64,scheme=intx4", ":merged"),
        ("torchao:scheme=fp8", ""),
    ],
)
def test_a_lora_gives_pefts_own_tokens(two_layers, lora, own_engine, ids, notation, merged):
    from peft import PeftModel

    adapter, model = parse_adapter(f"{lora}{merged}"), str(two_layers)
    loaded = own_engine.load(LoadRequest(model, resolve(notation), adapter), threading.Event())
    prompt = own_engine.encode(model, PROMPT, None, False)
    settings = GenerationSettings(max_new_tokens=NEW)
    got = own_engine.generate(loaded.handle, prompt, settings, threading.Event(), adapter=adapter).token_ids
    own_engine.unload()
    base = plain(two_layers, *ON_CPU[notation][:2])
    bare = generated(base, ids)
    wrapped = PeftModel.from_pretrained(base, str(lora)).eval()
    expected = generated(wrapped.merge_and_unload() if merged else wrapped, ids)
    assert got == expected != bare


@pytest.mark.parametrize(
    ("variant", "adapter", "words"),
    [
        ("torchao", AdapterKind("a", "LoHa", "LOHA", merged=True), ["LoHa", "merge", "unmerged"]),
        ("torchao:scheme=int4", AdapterKind("a", "LoRA", "LORA", merged=True), ["int4", "merge", "unmerged"]),
        ("torchao:scheme=int4", AdapterKind("a", "DoRA", "LORA", dora=True), ["DoRA", "int4", "intx4"]),
    ],
)
def test_adapters_that_peft_cannot_put_on_are_refused_by_name(variant, adapter, words):
    with pytest.raises(UserError) as caught:
        AO.check_adapter(resolve(variant), adapter)
    assert all(word in str(caught.value) for word in words)
    AO.check_adapter(resolve(variant), AdapterKind("a", "LoRA", "LORA"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_training_is_for_what_has_gradients(scheme, two_layers):
    import torch

    variant = resolve(f"torchao:scheme={scheme.name}")
    if not scheme.trains:
        with pytest.raises(UserError, match=f"{scheme.name}.*") as caught:
            AO.training(variant, "cpu")
        assert "scheme=fp8" in caught.value.advice
        return
    assert AO.training(variant, "cpu").dtype == "bf16"
    model = plain(two_layers, scheme.name, "row")
    assert model.hf_quantizer.is_trainable, "transformers' Trainer would refuse it"
    x = torch.randn(3, 576, dtype=torch.bfloat16, requires_grad=True)
    layer = model.model.layers[0].self_attn.q_proj
    layer(x).sum().backward()
    expected = layer.weight.dequantize().sum(0).expand(3, -1)
    assert torch.allclose(x.grad, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp32", 4)])
def test_the_estimate_counts_the_unpacked_weights_that_autograd_keeps(checkpoint, dtype, width):
    import torch

    variant = resolve(f"torchao:dtype={dtype}")
    model = AO.load(checkpoint, variant, CPU, lambda *_: None).model
    weights = {name: p.numel() for name, p in quantized(model).items()}
    own = {t.untyped_storage().data_ptr() for p in model.parameters() for t in plain_tensors(p)}
    kept: dict[int, int] = {}

    def keep(tensor):
        for part in plain_tensors(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own and part.numel() in weights.values():
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = model.get_input_embeddings()(torch.tensor([[1, 2, 3]])).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(inputs_embeds=hidden).logits.sum()

    def activations(notation: str, checkpointing: bool) -> int:
        settings = TrainSettings(gradient_checkpointing=checkpointing)
        return memory_estimate.estimate(checkpoint, resolve(notation), settings, rows=9, longest=64, device="cpu",
                                        free_bytes=10**12).activation_bytes  # fmt: skip

    plain_dtype = activations(dtype, False)
    assert sum(kept.values()) == width * sum(weights.values())
    assert activations(variant.notation, False) - plain_dtype == pytest.approx(sum(kept.values()), rel=0.01)
    assert activations(variant.notation, True) < activations(variant.notation, False)


# ---------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda:0"


ON_CUDA = [*ON_CPU, "torchao:scheme=int4", "torchao:scheme=fp8dyn", "torchao:group=tensor,scheme=fp8dyn"]


def on_cuda(folder: Path, variant, gpu: str):
    import torch
    from transformers import AutoModelForCausalLM, TorchAoConfig

    values = AO.values(variant)
    scheme = BY_NAME[values["scheme"]]
    quantization = TorchAoConfig(config(scheme, values["group"] or scheme.groups[0]))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": gpu}, quantization_config=quantization
    ).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("notation", ON_CUDA)
def test_on_cuda_against_plain_transformers(gpu, two_layers, own_engine, ids, notation):
    """Tokens, rows, bytes and unpacked weights, eagerly."""
    import torch

    opened = open_checkpoint(str(two_layers))
    variant = AO.complete(resolve(notation), opened)
    request = api.request(PROMPT, [variant.notation], str(two_layers), max_new_tokens=NEW, fidelity="none", chat=False,
                          decode="eager")  # fmt: skip
    (column,) = runner.run(request, engine=own_engine, emit=lambda event: None).cells
    own_engine.unload()
    assert column.status == "ok", column.error
    model = on_cuda(two_layers, variant, gpu)
    given = torch.tensor([ids], device=gpu)
    out = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False
    )
    assert column.token_ids == tuple(out[0].tolist())[len(ids) :]
    rows = {row.name: row for row in column.layers}
    for name, tensor in quantized(model).items():
        parts = [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
        assert rows[name].bytes + rows[name].quant_state_bytes == sum(p.nbytes for p in parts)
    held = sum(r.bytes + r.quant_state_bytes for r in column.layers)
    assert AO.needed_bytes(variant, opened) == pytest.approx(held, rel=0.03)
    reference = plain_weights(two_layers)
    for name, module in model.named_modules():
        if (unpacked := AO.dequantize(module)) is not None:
            whole = reference[f"{name}.weight"].to(unpacked)
            assert float((unpacked - whole).norm() / whole.norm()) < 0.2


def plain_weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["graph", "compiled"])
@pytest.mark.parametrize("notation", ON_CUDA)
def test_a_captured_step_gives_the_eager_tokens(gpu, two_layers, own_engine, notation, decode):
    """Also that it is captured at all."""
    made = {}
    for way in ("eager", decode):
        request = api.request(
            PROMPT, [notation], str(two_layers), max_new_tokens=16, fidelity="none", chat=False, decode=way
        )
        (made[way],) = runner.run(request, engine=own_engine, emit=lambda event: None).cells
        own_engine.unload()
        assert made[way].status == "ok", made[way].error
    assert not [n for n in made[decode].notes if n.startswith(("Decoded eagerly", "Not compiled"))]
    assert made[decode].token_ids[:4] == made["eager"].token_ids[:4]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(576, 1536), (4096, 14336)])
def test_one_row_on_cuda_is_the_integer_product(gpu, shape):
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    layer = torch.nn.Sequential(
        torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device=gpu)
    )
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    x = torch.randn(1, 1, shape[1], dtype=torch.bfloat16, device=gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            ours = AO.capture_forward(layer[0])(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    weight = layer[0].weight
    row = type(weight).from_hp(x[0], weight.act_quant_kwargs.granularity)
    product = row.qdata.double() @ weight.qdata.double().t() * row.scale.double() * weight.scale.double().t()
    assert torch.allclose(ours[0].double(), product, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int4", "fp8dyn"])
def test_a_checkpoint_saved_on_cuda_loads_ready_made(gpu, two_layers, own_engine, tmp_path, scheme):
    opened = open_checkpoint(str(two_layers))
    variant = AO.complete(resolve(f"torchao:scheme={scheme}"), opened)
    on_cuda(two_layers, variant, gpu).save_pretrained(tmp_path / "saved")
    for file in two_layers.glob("*token*"):
        shutil.copy(file, tmp_path / "saved")
    notations = [variant.notation, f"torchao@{tmp_path / 'saved'}"]
    request = api.request(PROMPT, notations, str(two_layers), max_new_tokens=NEW, fidelity="none", chat=False)
    made = runner.run(request, engine=own_engine, emit=lambda event: None).cells
    own_engine.unload()
    assert [c.status for c in made] == ["ok", "ok"], [c.error for c in made]
    assert made[0].token_ids == made[1].token_ids
    assert [r.bytes for r in made[0].layers] == [r.bytes for r in made[1].layers]


@pytest.mark.gpu
@pytest.mark.parametrize("notation", ["torchao", "torchao:scheme=fp8"])
def test_spread_over_the_gpu_and_main_memory(gpu, two_layers, ids, notation):
    """accelerate moves torchao's tensors to the GPU at each use; rows and bytes are those of one device."""
    import torch

    opened = open_checkpoint(str(two_layers))
    variant = AO.complete(resolve(notation), opened)
    whole = AO.load(opened, variant, Placement(gpu), lambda *_: None).model
    spread = AO.load(opened, variant, Placement(gpu, {0: 70_000_000, "cpu": 10**9}), lambda *_: None).model
    sizes = [{r.name: (r.bytes, r.quant_state_bytes) for r in layers.rows(m, AO)} for m in (whole, spread)]
    assert sizes[0] == sizes[1]
    given = torch.tensor([ids], device=gpu)
    with torch.inference_mode():
        one, two = (m(given).logits.float().cpu() for m in (whole, spread))
    assert torch.allclose(one, two, atol=0.1)
