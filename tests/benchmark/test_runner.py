"""The bench on tiny shapes: what it measures is there, its checks can fail, and its arithmetic is right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.benchmark import random_models, runner, runs, table
from comparator.benchmark.types import Options, Row, Timed
from comparator.core.errors import UserError
from comparator.sources import open_checkpoint

TINY = Options(decode=("eager",), prompt_tokens=24, new_tokens=8, pairs=2, ttft_tokens=32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    random_models.write(folder / "full", "llama-tiny")
    random_models.write(folder / "gptq", "llama-tiny", backend=backend_for(resolve("gptq")))
    return folder


def test_a_report_holds_what_was_measured(tiny):
    *_, report = runner.run(str(tiny / "full"), [resolve("bf16"), resolve("nf4")], TINY)
    assert [row.variant for row in report.rows] == ["bf16", "nf4"]
    for row in report.rows:
        assert row.error is None and row.load_s > 0 and row.resident_bytes > 0
        (eager,) = row.paths
        assert eager.error is None and eager.check == "8 tokens equal"
        assert len(eager.runs) == len(row.stock.runs) == 2
        assert eager.ratio == pytest.approx(
            sum(a / b for a, b in zip(eager.runs, row.stock.runs, strict=True)) / 2
        ), "of two pairs the median is the mean of the pairs' ratios"
        assert row.ttft["prompt_tokens"] == 32 and row.ttft["ratio"] > 0
        assert row.floor_tok_s is None, "a CPU has no floor here: its caches would make it a lie"
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["variant"] == "nf4"
    text = table.table(report)
    assert "| nf4 | stock generate |" in text and "batch 1, greedy" in text


def test_a_step_is_told_kernel_by_kernel(tiny):
    *_, report = runner.run(str(tiny / "full"), [resolve("bf16")], replace(TINY, ttft_tokens=0, profile=True))
    (eager,) = report.rows[0].paths
    found = eager.profile
    assert 0 < found.covered_s <= 1.001 * found.busy_s < 3 * found.step_s and found.kernels == tuple(
        sorted(found.kernels, key=lambda k: -k.seconds)
    )
    products = next(k for k in found.kernels if k.name in ("aten::mm", "aten::addmm", "aten::linear"))
    assert products.calls == 15, (
        "two layers of seven products, and the head: steps were lost or counted twice"
    )
    text = table.table(report)
    assert f"| {products.name} | 15 |" in text and "lie between them" in text


def test_kernels_side_by_side_are_not_counted_twice(tiny):
    from dataclasses import replace as changed

    from comparator.metrics.kernels import Kernel, StepProfile, covered

    assert covered([]) == 0
    assert covered([(5, 6), (0, 4), (1, 3), (3.5, 4.5)]) == 5.5
    *_, report = runner.run(str(tiny / "full"), [resolve("bf16")], replace(TINY, ttft_tokens=0))
    (eager,) = report.rows[0].paths
    eager.profile = StepProfile(0.003, (Kernel("product", 224, 0.0034), Kernel("head", 1, 0.0004)), 0.0028)
    text = table.table(report)
    assert (
        "in 2.80 ms of it kernels run (all together 3.80 ms: some run on parallel streams); 0.20 ms lie"
        in text
    )
    assert "| product | 224 | 15.2 | 3.400 | 89.5 |" in text
    eager.profile = changed(eager.profile, covered_s=0.0038)
    assert "parallel streams" not in table.table(report)


def test_kernel_names_are_what_a_person_tells_them_by():
    from comparator.metrics.kernels import short

    add = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, "
        "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)"
    )
    assert short(add) == "vectorized_elementwise_kernel<CUDAFunctor_add>"
    assert short("void gemm_4bit_simt<__nv_bfloat16, 1, 2>(float const*)") == "gemm_4bit_simt"
    assert short("triton_red_fused_mm_t_1") == "triton_red_fused_mm_t_1"


def test_a_batch_is_measured_whole(tiny):
    options = Options(decode=("eager",), prompt_tokens=24, new_tokens=8, pairs=2, batch=3)
    *_, report = runner.run(str(tiny / "full"), [resolve("bf16"), resolve("nf4")], options)
    for row in report.rows:
        assert row.error is None and row.ttft is None
        (eager,) = row.paths
        assert eager.error is None and eager.check == "3 of 3 sequences equal generate's"
        assert len(eager.runs) == 2 and eager.decode_tok_s > 0 and eager.ttft_s > 0 and eager.ratio > 0
    assert "batch 3, greedy" in table.table(report)


@pytest.mark.parametrize("notation", ["fp32", "bf16"])
def test_a_batch_on_fixed_addresses_gives_the_eager_tokens(tiny, notation):
    """The recorded step is called here instead of replayed: all but the capture."""
    import threading

    import torch

    from comparator.benchmark import batch
    from comparator.core.settings import Settings
    from comparator.engine.pool import Pool
    from comparator.sources import open_checkpoint

    pool, checkpoint = Pool(Settings()), open_checkpoint(str(tiny / "full"), settings=Settings())
    slot, _ = pool.load(checkpoint, resolve(notation), None, True, set(), lambda *_: None, threading.Event())
    given = torch.tensor([runs.prompt_ids(slot.model, 20, n) for n in range(4)])
    with runs.endless(slot.model):
        expected = batch._eager(slot.model, given, 10)[2]
        recorded, said = batch.record(slot.model, given, 10, compiled=False)
        assert recorded.fixed.batch == 4 and "of 36 tokens equal" in said
        for turn in range(2):  # the second run must not see the first one's cache
            start, times, tokens = batch.replayed(slot.model, recorded, given, 10)
            assert len(times) == 10 and times == sorted(times) and start < times[0]
            if notation == "fp32":
                assert tokens == expected, f"run {turn}: token, position or cache of the batched step is off"
            assert len({tuple(s[n] for s in tokens) for n in range(4)}) == 4, "the sequences became one"
    pool.unload()


def test_a_graph_that_is_asked_for_and_not_there_is_an_error(tiny):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    options = Options(decode=("graph",), prompt_tokens=8, new_tokens=4, pairs=1)
    *_, report = runner.run(str(tiny / "full"), [resolve("bf16")], options)
    (timed,) = report.rows[0].paths
    assert "CUDA" in timed.error and timed.decode_tok_s is None and timed.path == "graph"


def test_a_compiled_step_that_is_refused_is_an_error_and_not_the_graphs_figure(tiny, monkeypatch):
    """The column itself falls back to the plain recording; a bench must not print that one's speed as compiled."""
    from comparator.decoding import Decoder
    from comparator.decoding import compile as decoding_compile
    from comparator.runtimes.transformers import TransformersModel

    def cannot(fixed):
        raise RuntimeError("the compiler gave up")

    monkeypatch.setattr(decoding_compile, "compiled", cannot)
    made: dict[int, Decoder] = {}
    on_card = property(lambda slot: made.setdefault(id(slot), Decoder(slot.model, "cuda:0")))
    monkeypatch.setattr(TransformersModel, "decoder", on_card)  # on a CPU “recording” is calling the step
    options = Options(decode=("graph", "compiled"), prompt_tokens=8, new_tokens=4, pairs=1)
    *_, report = runner.run(str(tiny / "full"), [resolve("fp32")], options)
    graph, compiled = report.rows[0].paths
    assert (graph.path, graph.error) == ("cuda-graph", None) and graph.decode_tok_s > 0
    assert compiled.path == "compiled" and "gave up" in compiled.error and compiled.decode_tok_s is None


def test_one_variants_trouble_is_its_row_alone(tiny):
    given = [resolve("gptq@/nowhere/at/all"), resolve("bf16")]
    *_, report = runner.run(str(tiny / "full"), given, TINY)
    assert report.rows[0].error and report.rows[1].error is None


def test_tokens_that_are_not_generates_are_an_error(tiny, monkeypatch):
    real = runs.stock_run
    monkeypatch.setattr(runner, "stock_run", lambda *a: (*real(*a)[:2], [7] * 8))
    *_, report = runner.run(str(tiny / "full"), [resolve("bf16")], TINY)
    assert "not stock generate's" in report.rows[0].paths[0].error


def test_a_figure_above_the_floor_is_no_result():
    row = Row("bf16", floor_tok_s=200.0, step_bytes=15 * 10**9)
    fast, sound = Timed("graph", decode_tok_s=753.0, ratio=20.0), Timed("graph", decode_tok_s=112.0)
    runner._against_floor(fast, row)
    runner._against_floor(sound, row)
    assert fast.error and "roofline" in fast.error and fast.decode_tok_s is None and fast.ratio is None
    assert sound.error is None and sound.floor_share == pytest.approx(0.56)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_every_weight_once_but_the_embedding(tied):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from comparator.backends import backend_for
    from comparator.metrics import bandwidth, layers

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    rows = layers.rows(model, backend_for(resolve("bf16")))
    blocks = sum(p.numel() * 2 for p in model.model.layers.parameters()) + 32 * 2
    assert bandwidth.step_bytes(model, rows) == blocks + 100 * 32 * 2, "the head counts once, tied or not"
    assert bandwidth.copy_bytes_s("cpu") is None and bandwidth.floor_tok_s("cpu", 10) is None


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_random_layers_are_read_as_weights_of_the_spread(tmp_path, tiny, method):
    """By the method's own unpacking: a mean that is not 0 overflows fp16 in a deep model."""
    backend = backend_for(resolve(method))
    random_models.write(tmp_path / method, "llama-tiny", backend=backend)
    checkpoint = open_checkpoint(str(tiny / "full"))
    variant = backend.complete(resolve(f"{method}@{tmp_path / method}"), checkpoint)
    model = backend.load(checkpoint, variant, Placement("cpu"), lambda *_: None).model
    for module in (layer.mlp.gate_proj for layer in model.model.layers):
        weight = backend.dequantize(module)
        weight = module.weight.float() if weight is None else weight
        assert weight.shape == (256, 128)
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(weight.mean())) < 0.001


def test_energy_is_power_times_time_per_token():
    from comparator.metrics.energy import Used, metered

    used = Used(joules=600.0, start_s=0.0, end_s=2.0)  # 300 W
    assert used.per_token([0.5, 1.0, 1.5]) == pytest.approx(300 * 1.0 / 2)
    assert Used(joules=3.0, start_s=0.0, end_s=0.1).per_token([0.0, 0.1]) is None, (
        "shorter than the meter's step"
    )
    assert used.per_token([0.5]) is None
    with metered("cpu") as nothing:
        pass
    assert nothing.joules is None, "what was not measured is None, not 0"


def test_unknown_shapes_and_paths_are_named(tiny):
    with pytest.raises(UserError, match="llama-9b"):
        random_models.shape("llama-9b")
    with pytest.raises(UserError, match="warp"):
        next(runner.run(str(tiny / "full"), [resolve("bf16")], Options(decode=("warp",))))


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    output = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "comparator", "bench", "--shapes", "llama-tiny", "-v", "bf16", "--prompt-tokens", "8",
         "--new-tokens", "4", "--pairs", "1", "--decode", "eager", "-o", str(output)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| bf16 | stock generate |" in done.stdout
    report = json.loads(output.read_text())
    assert report["options"]["new_tokens"] == 4 and report["rows"][0]["paths"][0]["decode_tok_s"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("notation", ["bf16", "int8", "nf4", "fp4"])
def test_twenty_loads_leave_nothing_behind(tiny, notation):
    import threading

    import torch

    from comparator.core.request import GenerationSettings
    from comparator.core.settings import get_settings
    from comparator.engine.pool import Pool
    from comparator.sources import open_checkpoint

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    checkpoint, pool = open_checkpoint(str(tiny / "full")), Pool(get_settings())
    before = None
    for _ in range(20):
        slot, _ = pool.load(
            checkpoint, resolve(notation), None, True, set(), lambda *_: None, threading.Event()
        )
        slot.decoder.plan(list(range(8)), GenerationSettings(max_new_tokens=8, decode="graph"))
        del slot
        pool.unload()
        if before is None:  # what libraries keep for themselves is there after the first
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() - before < 32 * 2**20
