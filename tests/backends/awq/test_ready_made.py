"""AWQ checkpoints, packed by hand from real weights: loaded by us and by plain transformers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import awq_models
import pytest
import tiny_models

from comparator.backends import backend_for, owner, resolve
from comparator.backends.awq import ready_made
from comparator.backends.awq.kernels import KERNELS
from comparator.backends.base import AdapterKind, Placement
from comparator.backends.gptqmodel_layers.kernels import Packed
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.events import Done
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Cell
from comparator.engine.local import LocalEngine
from comparator.sources import open_checkpoint

PROMPT = "The capital of France is"
AWQ = backend_for(resolve("awq@x"))


@pytest.fixture(scope="module")
def made(two_layers, tmp_path_factory):
    """(folder, what each packed weight means) of the two-layer model in 4 bits."""
    folder = tmp_path_factory.mktemp("awq") / "four"
    return folder, awq_models.quantized(two_layers, folder)


@pytest.fixture(scope="module")
def engine():
    engine = LocalEngine()
    yield engine
    engine.unload()


def run(engine, model: Path, *variants: str, tokens: int = 8):
    request = Request(
        str(model), tuple(Cell(resolve(v)) for v in variants), PROMPT, chat=False,
        settings=GenerationSettings(max_new_tokens=tokens), fidelity="none",
    )  # fmt: skip
    last = list(compare(request, engine=engine))[-1]
    assert isinstance(last, Done)
    return last.comparison


@pytest.fixture(scope="module")
def comparison(made, two_layers, engine):
    """bf16, and the checkpoint with each kernel and dtype that a CPU has."""
    name = f"awq@{made[0]}"
    found = run(engine, two_layers, "bf16", name, f"{name}:kernel=torch", f"{name}:dtype=bf16")
    assert found.ok, [c.error for c in found.cells]
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.save(folder, "llama", hidden_size=64, intermediate_size=128)
    return folder


def by_transformers(folder: Path, backend: str, dtype: str = "float16"):
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map="cpu", quantization_config=AwqConfig(backend=backend)
    )


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("cell", "backend", "dtype"),
    [(1, "auto", "float16"), (2, "torch_awq", "float16"), (3, "auto", "bfloat16")],
)
def test_greedy_tokens_are_those_of_plain_transformers(comparison, made, cell, backend, dtype):
    from transformers import AutoTokenizer

    model = by_transformers(made[0], backend, dtype)
    inputs = AutoTokenizer.from_pretrained(made[0])(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tuple(output[0, inputs["input_ids"].shape[1] :].tolist()) == comparison.cells[cell].token_ids


def test_the_column_says_what_it_is(comparison, made):
    _, auto, torch_cell, bf16 = comparison.cells
    assert auto.variant == f"awq@{made[0]}:g64"
    assert auto.kernel == bf16.kernel == "gptqmodel TorchAtenAwqLinear"
    assert torch_cell.kernel == "gptqmodel AwqTorchLinear"
    assert {r.storage_dtype for r in bf16.layers if r.name.endswith("norm.weight")} == {"bf16"}


def test_layer_rows_and_bytes_are_those_of_the_stored_tensors(comparison, made):
    """The torch kernel multiplies what is stored; an independent sum over the file gives the same bytes."""
    from safetensors.torch import load_file

    tensors = load_file(made[0] / "model.safetensors")
    column = comparison.cells[2]
    rows = {row.name: row for row in column.layers}
    packed = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    assert len(packed) == 14, "seven layers in each of two blocks"
    for name in packed:
        row = rows[f"{name}.qweight"]
        outputs, inputs = made[1][name].shape
        state = sum(
            tensors[f"{name}.{p}"].numel() * tensors[f"{name}.{p}"].element_size()
            for p in ("qzeros", "scales")
        )
        assert (row.logical_dtype, row.shape, row.compute_dtype) == ("int4 (AWQ)", (outputs, inputs), "fp16")
        assert (row.bytes, row.quant_state_bytes) == (outputs * inputs // 2, state)
        assert row.bits_per_weight == pytest.approx(4 + 20 / 64), (
            "16 bits of scale and 4 of zero point for 64 weights"
        )
        assert row.module_class == "gptqmodel AwqTorchLinear"
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    memory = column.memory
    held = memory.loaded_weight_bytes + memory.loaded_quant_state_bytes
    assert held == total
    needed = AWQ.needed_bytes(resolve(column.variant), open_checkpoint(str(made[0])))
    assert abs(needed - held) < 0.03 * held


def test_what_the_cpu_kernel_rearranges_is_counted(comparison):
    """Its weight has as many bytes; scales and zero points become bf16, and lie beside a copy of both."""
    row = next(r for r in comparison.cells[1].layers if r.name.endswith("q_proj.qweight"))
    assert row.loaded is not None and row.loaded.storage_dtype == "int32" and row.storage_dtype == "uint8"
    outputs, inputs = row.shape
    assert row.bytes == outputs * inputs // 2 and row.compute_dtype == "bf16"
    assert row.quant_state_bytes == (2 + 2 + 4) * outputs * inputs // 64


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "sym"), [(32, False), (-1, False), (64, True)])
def test_the_weights_are_those_that_were_stored(tiny, tmp_path, bits, group, sym):
    """Unpacking, gptqmodel's own and the kernel's product against what was packed."""
    import torch
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    meant = awq_models.quantized(tiny, tmp_path / "made", bits, group, sym)
    model = by_transformers(tmp_path / "made", "torch_awq")
    for name, weight in meant.items():
        module, expected = model.get_submodule(name), torch.from_numpy(weight)
        assert owner(module) is AWQ
        got = AWQ.dequantize(module)
        assert got.shape == expected.shape and torch.allclose(
            got, expected, atol=1e-3 * float(expected.abs().max())
        )
        size = module.in_features if group < 0 else group
        own = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), bits, size)
        assert torch.equal(got, own.T.float()), "gptqmodel unpacks something else"
        x = torch.randn(3, module.in_features, dtype=torch.float16)
        assert torch.allclose(module(x).float(), x.float() @ expected.T, atol=0.02)


def test_the_cpu_kernel_multiplies_those_weights(made):
    import torch

    model = by_transformers(made[0], "auto")
    name, weight = next(iter(made[1].items()))
    module, expected = model.get_submodule(name), torch.from_numpy(weight)
    assert torch.allclose(AWQ.dequantize(module), expected, atol=1e-3), "as it is stored"
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert module.qweight.dtype == torch.uint8, "the first use rearranges"
    got = AWQ.dequantize(module)
    assert (got - expected).norm() < 0.01 * expected.norm(), "beyond what bf16 scales round"


def test_modules_that_stay_are_those_that_the_config_names(tiny, tmp_path, engine):
    awq_models.quantized(tiny, tmp_path / "made", 4, 32, kept=("self_attn.k_proj",))
    column = run(engine, tiny, f"awq@{tmp_path / 'made'}").cells[0]
    assert column.status == "ok", column.error
    stored = {row.name.rsplit(".", 2)[-2]: row.logical_dtype for row in column.layers}
    assert stored["k_proj"] == "fp16" and stored["q_proj"] == "int4 (AWQ)"


def test_the_names_of_older_configs_are_read(tiny, tmp_path, engine):
    """transformers knows neither and would take 4 bits in groups of 128."""
    awq_models.quantized(tiny, tmp_path / "old", 4, 32, w_bit=4, q_group_size=32, group_size=None)
    found = run(engine, tiny, f"awq@{tmp_path / 'old'}")
    column = found.cells[0]
    assert column.status == "ok" and column.variant.endswith(":g32"), column.error
    assert run_code(found, 0) == column.token_ids
    awq_models.quantized(tiny, tmp_path / "new", 4, 32)
    assert run(engine, tiny, f"awq@{tmp_path / 'new'}").cells[0].token_ids == column.token_ids


def test_the_document_comes_back_as_it_was(comparison):
    from comparator.core import document

    again = document.loads(document.dumps(comparison))
    assert (
        again.cells[1].layers == comparison.cells[1].layers
        and again.cells[1].kernel == comparison.cells[1].kernel
    )


def run_code(comparison, number: int) -> tuple[int, ...]:
    """The new tokens of a column's code."""
    from comparator.reporting.snippet import snippet

    names: dict = {}
    exec(compile(snippet(comparison.cells[number], comparison), "code", "exec"), names)
    return tuple(names["new_tokens"])


def test_the_code_gives_the_same_tokens(comparison):
    assert run_code(comparison, 2) == comparison.cells[2].token_ids


# ---------------------------------------------------------------- refused


def refused(action, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert caught.value.advice
    for word in words:
        assert word in str(caught.value), f"“{word}” is missing from: {caught.value}"


def test_options_that_contradict_the_checkpoint_are_refused(made, two_layers):
    checkpoint = open_checkpoint(str(two_layers))

    def complete(options: str):
        return lambda: AWQ.complete(resolve(f"awq@{made[0]}:{options}"), checkpoint)

    refused(complete("8bit"), "bits=8", "bits=4")
    refused(complete("g128"), "group=128", "group=64")
    refused(complete("sym=true"), "sym=true", "sym=false")
    for fine in ("4bit", "g64", "sym=false", "4bit,g64,kernel=torch"):
        assert complete(fine)().notation in (f"awq@{made[0]}:g64", f"awq@{made[0]}:g64,kernel=torch")
    refused(lambda: resolve("awq@x:8bit,kernel=torch_aten"), "torch_aten", "4 bits", "kernel=")


def test_default_values_that_contradict_the_checkpoint_are_refused_too(tiny, tmp_path):
    awq_models.quantized(tiny, tmp_path / "made", 8, 32, sym=True)
    checkpoint = open_checkpoint(str(tiny))
    assert AWQ.complete(resolve(f"awq@{tmp_path / 'made'}"), checkpoint).notation.endswith(
        ":8bit,g32,sym=true"
    )
    refused(lambda: AWQ.complete(resolve(f"awq@{tmp_path / 'made'}:4bit"), checkpoint), "bits=4", "bits=8")
    refused(lambda: AWQ.complete(resolve(f"awq@{tmp_path / 'made'}:sym=false"), checkpoint), "sym=false")


def test_other_sources_are_refused_by_name(made, two_layers, tiny, tmp_path):
    checkpoint = open_checkpoint(str(two_layers))
    refused(lambda: AWQ.complete(resolve(f"awq@{two_layers}"), checkpoint), "not quantized")
    refused(lambda: AWQ.complete(resolve(f"awq@{made[0]}"), open_checkpoint(str(tiny))), "hidden_size")
    other = (
        awq_models.quantized(tiny, tmp_path / "other", quant_method="gptq", group=32) and tmp_path / "other"
    )
    refused(
        lambda: AWQ.complete(resolve(f"awq@{other}"), open_checkpoint(str(tiny))), "gptq", f"gptq@{other}"
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"version": "gemv"}, ["gemv", "gemm"]),
        ({"bits": 5}, ["bits=5"]),
        ({"bits": 8}, ["4 bits", "8 bits"]),
        ({"group_size": 64}, ["groups", "64"]),
        ({"group_size": "all"}, ["group_size='all'"]),
        ({"modules_to_not_convert": "lm_head"}, ["modules_to_not_convert"]),
        ({"modules_to_not_convert": ["mlp.up_proj"]}, ["up_proj", "modules_to_not_convert"]),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_files_is_refused(tiny, tmp_path, config, words):
    awq_models.quantized(
        tiny, tmp_path / "made", 4, 32, **{"version": "gemm", **config}
    ) if "bits" not in config else (awq_models.quantized(tiny, tmp_path / "made", 4, 32))
    file = tmp_path / "made" / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"] |= config
    file.write_text(json.dumps(values))
    refused(lambda: ready_made.read(open_checkpoint(str(tmp_path / "made"))), *words)


def test_files_that_would_load_as_something_else_are_refused(tiny, tmp_path):
    name = "model.layers.1.mlp.up_proj"

    def broken(folder: str, change, *words: str) -> None:
        awq_models.quantized(tiny, tmp_path / folder, 4, 32)
        awq_models.rewrite(tmp_path / folder, change)
        refused(lambda: ready_made.read(open_checkpoint(str(tmp_path / folder))), *words)

    def with_head(tensors):
        parts, _ = awq_models.stored(tensors["model.embed_tokens.weight"], 4, 32)
        return {**tensors, **{f"lm_head.{n}": t for n, t in parts.items()}}

    def plain(tensors):
        import torch

        return {n: t for n, t in tensors.items() if not n.startswith(name)} | {
            f"{name}.weight": torch.ones(128, 64)
        }

    def eight(tensors):
        import torch

        parts, _ = awq_models.stored(torch.randn(128, 64), 8, 32)
        return {**tensors, **{f"{name}.{n}": t for n, t in parts.items()}}

    broken("head", with_head, "lm_head.qweight", "random")
    broken("plain", plain, f"{name}.weight", "modules_to_not_convert")
    broken("eight", eight, name, "8 bits", "4 bits")
    broken("zeros", lambda t: {n: v for n, v in t.items() if n != f"{name}.qzeros"}, "qzeros", name)
    broken("gemv", lambda t: {n: v.T if n == f"{name}.qweight" else v for n, v in t.items()}, name, "version")


def test_experts_that_transformers_keeps_as_one_parameter_are_refused(tmp_path):
    tiny_models.save(tmp_path / "moe", "mixtral", hidden_size=64, intermediate_size=128)
    awq_models.quantized(tmp_path / "moe", tmp_path / "made", 4, 32, kept=("gate",))
    model = open_checkpoint(str(tmp_path / "moe"))
    refused(
        lambda: AWQ.complete(resolve(f"awq@{tmp_path / 'made'}"), model), ".experts.0.", "MixtralForCausalLM"
    )


# ---------------------------------------------------------------- kernels, adapters, training


@pytest.mark.parametrize(
    ("kernel", "packed", "device", "words"),
    [
        ("triton", Packed(4, 64, False, False), "cpu", "NVIDIA GPU"),
        ("torch_aten", Packed(8, 64, False, False), "cpu", "4 bits"),
        ("torch_aten", Packed(4, -1, False, False), "cpu", "groups of 16"),
        ("torch_aten", Packed(4, 64, False, False), "cuda:0", "CPU only"),
        ("triton", Packed(4, 64, False, False, "bf16"), "cuda:0", "fp16"),
        ("triton", Packed(4, 64, False, False, sizes=frozenset({(72, 64)})), "cuda:0", "72 × 64"),
    ],
)
def test_limits_of_the_kernels_are_checked_before_loading(kernel, packed, device, words):
    refused(lambda: KERNELS.choose(kernel, packed, device), words, kernel)


def test_auto_takes_what_starts_at_once():
    assert KERNELS.choose("auto", Packed(4, 64, False, False), "cpu").name == "torch_aten"
    assert KERNELS.choose("auto", Packed(8, 64, False, False), "cpu").name == "torch"
    assert KERNELS.choose("auto", Packed(4, 64, False, False), "cuda:0").name == "triton"


def test_the_kernels_are_gptqmodel_s_and_transformers_takes_their_names():
    import importlib

    from transformers import AwqConfig

    files = (
        "marlin_awq",
        "exllamav2_awq",
        "gemm_awq",
        "gemm_awq_triton",
        "torch_aten_kernel_awq",
        "torch_awq",
    )
    modules = [importlib.import_module(f"gptqmodel.nn_modules.qlinear.{name}") for name in files]

    for kernel in KERNELS.kernels:
        assert AwqConfig(backend=kernel.backend).backend == kernel.backend
        layer = next(c for m in modules for n, c in vars(m).items() if n == kernel.class_name)
        assert set(kernel.bits) <= set(layer.SUPPORTS_BITS)
        assert set(kernel.groups) <= set(layer.SUPPORTS_GROUP_SIZE)


def test_adapters_are_told_apart():
    variant = resolve("awq@x")
    AWQ.check_adapter(variant, AdapterKind("me/lora", "LoRA", "LORA"))
    for kind in (
        AdapterKind("me/loha", "LoHa", "LOHA"),
        AdapterKind("me/dora", "DoRA", "LORA", dora=True),
        AdapterKind("me/lora", "LoRA", "LORA", merged=True),
    ):
        refused(lambda kind=kind: AWQ.check_adapter(variant, kind), kind.source, "AWQ")


def test_a_lora_adds_what_it_holds(made):
    import torch
    from peft import LoraConfig, get_peft_model

    model = by_transformers(made[0], "torch_awq")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = model(ids).logits
        wrapped = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        )
        assert not torch.equal(wrapped(ids).logits, before)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(ids).logits, before)


def test_training_takes_a_kernel_with_gradients():
    (variant, notes), *_ = AWQ.training_variants(resolve("awq@x"), "cpu")
    assert variant.notation == "awq@x:kernel=torch" and notes == ()
    names = [v.notation for v, _ in AWQ.training_variants(resolve("awq@x:kernel=marlin"), "cuda:0")]
    assert names == ["awq@x:kernel=triton", "awq@x:kernel=torch"], "nothing compiles unasked"
    assert AWQ.training_variants(resolve("awq@x:kernel=gemm"), "cuda:0")[0][0].notation == "awq@x:kernel=gemm"


def test_code_points_at_the_checkpoint():
    imports, setup, arguments = AWQ.code(resolve("awq@me/repo:kernel=torch"), Placement("cpu"))
    assert imports == ["from transformers import AwqConfig"]
    assert setup == ["quantization = AwqConfig(backend='torch_awq')"] and "dtype=torch.float16" in arguments
    assert AWQ.code_weights(resolve("awq@me/repo")) == "'me/repo'"
