"""A hand-made comparison that fills every field, for tests of what reads, writes or draws one.

Four columns: the bf16 reference, nf4 with everything measured, nf4 with an adapter, and int8 that failed.
"""

from __future__ import annotations

from dataclasses import replace

from comparator.core.prompt_set import SetAnswer, SetPrompt, SetResult
from comparator.core.request import GenerationSettings
from comparator.core.result import (
    CellResult,
    Comparison,
    Energy,
    Environment,
    ErrorInfo,
    Fidelity,
    Latency,
    LayerRow,
    LoadedLayer,
    Memory,
    ModelInfo,
    PromptFidelity,
    PromptInfo,
    RunFigures,
    StateTensor,
    TopToken,
)
from comparator.core.variant import CellName

_MODEL = ModelInfo("smollm2-135m", "0.1.2", "LlamaForCausalLM", 134515008)

EMBED = LayerRow(
    "model.embed_tokens.weight", "Embedding", "Parameter", "bf16", "bf16", "bf16", (49152, 576), (49152, 576),
    28311552, 56623104, 0, 16.0, "cpu",
)  # fmt: skip
HEAD = replace(
    EMBED, name="lm_head.weight", module_class="Linear", bytes=0, tied_to="model.embed_tokens.weight"
)
PLAIN = LayerRow(
    "model.layers.0.mlp.up_proj.weight", "Linear", "Parameter", "bf16", "bf16", "bf16", (1536, 576), (1536, 576),
    884736, 1769472, 0, 16.0, "cpu",
)  # fmt: skip
PACKED = LayerRow(
    "model.layers.0.mlp.up_proj.weight", "Linear4bit", "Params4bit", "uint8", "nf4", "bf16", (1536, 576),
    (1536, 288), 884736, 442368, 27712, 4.2506, "cpu",
    adapter_rank=8,
    loaded=LoadedLayer("uint8", (442368, 1), 442368, 55360),
    state=(StateTensor("absmax", "bf16", (1536, 9), 27648), StateTensor("code", "fp32", (16,), 64)),
    error={"relative": 0.0913, "sqnr_db": 20.79, "cosine": 0.9958, "max_abs": 0.3125},
)  # fmt: skip

PROMPT_FIDELITY = PromptFidelity(
    token_ids=(504, 3575, 282),
    tokens=(" The", " capital", " of"),
    kl=(0.0, 0.31, 0.02),
    p=(0.9, 0.4, 0.99),
    reference_p=(0.91, 0.7, 0.995),
    rank=(0, 1, 0),
    first_difference=1,
    top=(
        (TopToken(" The", 0.9),),
        (TopToken(" city", 0.5), TopToken(" capital", 0.4)),
        (TopToken(" of", 0.99),),
    ),
    reference_top=((TopToken(" The", 0.91),), (TopToken(" capital", 0.7),), (TopToken(" of", 0.995),)),
)
TEXT_FIDELITY = {
    "name": "built-in text", "tokens": 2048, "context": 512, "stride": 512, "ppl": 21.5, "ppl_se": 0.9,
    "reference_ppl": 16.25, "reference_ppl_se": 0.7,
    "kl": {"mean": 0.321, "se": 0.009, "median": 0.17, "p01": 0.0, "p99": 2.1, "max": 6.5},
    "kl_reverse": {"mean": 0.34, "se": 0.01, "median": 0.18},
    "delta_p": {"mean": -0.031, "se": 0.004, "rms": 0.19},
    "top1": {"mean": 0.728, "se": 0.0098},
    "top5_overlap": {"mean": 0.71, "se": 0.004},
    "floor": {"kl": {"mean": 0.0006, "se": 0.00002}},
}  # fmt: skip

REFERENCE = CellResult(
    variant="bf16",
    model=_MODEL,
    kernel="torch Linear",
    decode_path="eager",
    text="The capital of France is Paris.",
    token_ids=(504, 3575, 282, 4649, 314, 7042, 30, 2),
    finish_reason="eos",
    latency=Latency(
        load_s=1.25, ttft_s=0.2125, prefill_tok_s=174.12, decode_tok_s=15.08,
        itl_s=(0.066, 0.067, 0.065, 0.066, 0.068, 0.066, 0.0662), itl_p50_s=0.066, itl_p90_s=0.0674,
        itl_p99_s=0.06794, total_s=0.6767,
        runs=(RunFigures(0.2125, 15.08), RunFigures(0.22, 14.9), RunFigures(0.21, 15.2)),
    ),
    memory=Memory(
        loaded_weight_bytes=269031168, loaded_quant_state_bytes=0, weight_bytes=269031168, quant_state_bytes=0,
        adapter_bytes=0, resident_bytes=269031424, load_peak_bytes=301000000, run_peak_bytes=12000000,
        kv_cache_bytes=1013760, footprint_bytes=269031168, peak_source="process (resident set)",
    ),
    layers=(EMBED, PLAIN, HEAD),
)  # fmt: skip
NF4 = CellResult(
    variant="nf4",
    notes=("bitsandbytes repacked the weights at first use: (442368, 1) uint8 became (1536, 288).",),
    model=_MODEL,
    kernel="bitsandbytes Linear4bit",
    decode_path="eager",
    text="The city of Paris is the capital of France.",
    token_ids=(504, 2240, 282, 7042, 314),
    finish_reason="length",
    latency=Latency(
        load_s=2.5, prepare_s=0.75, ttft_s=0.3, prefill_tok_s=123.3, decode_tok_s=14.4,
        itl_s=(0.07, 0.069, 0.0694, 0.0694), itl_p50_s=0.0694, itl_p90_s=0.0699, itl_p99_s=0.06999, total_s=0.58,
        runs=(RunFigures(0.3, 14.4), RunFigures(0.31, 15.1), RunFigures(0.29, 14.2)),
    ),
    memory=Memory(
        loaded_weight_bytes=109819008, loaded_quant_state_bytes=6650000, weight_bytes=109819008,
        quant_state_bytes=3330000, adapter_bytes=0, resident_bytes=113149312, load_peak_bytes=290000000,
        run_peak_bytes=9000000, kv_cache_bytes=1013760, footprint_bytes=109819008,
        peak_source="process (resident set)",
    ),
    energy=Energy(0.75),
    fidelity=Fidelity(PROMPT_FIDELITY, TEXT_FIDELITY),
    layers=(EMBED, PACKED, HEAD),
)  # fmt: skip
ADAPTED = replace(
    NF4,
    adapter="pirate*0.5",
    text="Arr, matey! Paris it be.",
    latency=replace(NF4.latency, adapter_load_s=0.125, adapter_switch_s=0.004),
    memory=replace(NF4.memory, adapter_bytes=1900000),
    fidelity=Fidelity(refused="The reference column with this adapter failed."),
)
FAILED = CellResult(
    variant="int8:threshold=0",
    status="failed",
    error=ErrorInfo("int8 does not fit: it needs 163 MB, 120 MB are free.", "Unload nf4 (113 MB)."),
    model=_MODEL,
)


def comparison(**changes) -> Comparison:
    """The whole sample; `comparison(cells=…)` replaces fields."""
    whole = Comparison(
        id="S4mpleS4mpleS4mpleS4mp",
        created_at="2026-01-31T12:00:00+00:00",
        prompt=PromptInfo("What is the capital of France?", "Be brief.", True, 37),
        settings=GenerationSettings(max_new_tokens=32, repeats=3),
        environment=Environment(
            "CPU (2 cores)", None, "A processor", 25_000_000_000, "3.11.7",
            {"torch": "2.13.0+cpu", "transformers": "5.23.0", "bitsandbytes": "0.50.2", "peft": "0.21.2"},
        ),
        reference=CellName("bf16"),
        cells=(REFERENCE, NF4, ADAPTED, FAILED),
    )  # fmt: skip
    return replace(whole, **changes)


def with_set(count: int = 12, text: str = "The city of Paris.") -> Comparison:
    """The comparison with a prompt set: each third prompt flips to wrong in the second column, each fifth to right."""
    whole = comparison()
    prompts = tuple(
        SetPrompt(
            f"p{n}",
            f"Question {n}: {text}",
            system=text,
            expected=(text,),
            check="contains",
            kind=f"kind{n % 2}",
        )
        for n in range(count)
    )
    columns = []
    for at, cell in enumerate(whole.cells):
        failed = cell.status == "failed"
        columns.append(tuple(None if failed else _set_answer(n, at, text) for n in range(count)))
    return replace(whole, schema=2, prompt_set=SetResult("everyday", prompts, tuple(columns)))


def _set_answer(n: int, at: int, text: str) -> SetAnswer:
    passed = n % 5 != 0 if at == 0 else n % 3 != 0 if at == 1 else True
    measured = (
        {} if at == 0 else {"kl": 0.01 * (n + 1), "agreement": 0.9, "first_difference": 3, "compared": 10}
    )
    return SetAnswer(f"{text} {n}", 10, "length", passed, "" if passed else "it is not there", **measured)


# (notation, bytes of weights and quant state, mean KL in nats, tok/s): measured on the built-in model, so some lie close.
_EIGHT = (
    ("bf16", 269_031_168, 0.0, 15.1), ("fp16", 269_031_168, 0.00002, 14.8), ("int8", 163_400_000, 0.028, 7.3),
    ("int8:threshold=0", 163_100_000, 0.039, 7.9), ("nf4", 113_149_008, 0.321, 14.4), ("nf4:dq", 110_900_000, 0.322, 14.1),
    ("fp4", 113_149_008, 0.519, 13.9), ("gptq:4bit,g64", 116_200_000, 0.286, 15.0),
)  # fmt: skip


def many() -> Comparison:
    """Eight columns, each with a block's tensors, latencies and fidelity."""
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    columns = []
    for notation, size, kl, speed in _EIGHT:
        row = PLAIN if notation in ("bf16", "fp16") else PACKED
        blocks = tuple(
            replace(row, name=f"model.layers.{n}.{name}.weight") for n in range(4) for name in names
        )
        text = {**TEXT_FIDELITY, "kl": {**TEXT_FIDELITY["kl"], "mean": kl, "se": kl / 30}}
        prompt = replace(PROMPT_FIDELITY, kl=tuple(k * 3 * kl for k in PROMPT_FIDELITY.kl))
        columns.append(
            replace(
                REFERENCE if notation == "bf16" else NF4,
                variant=notation,
                latency=replace(NF4.latency, decode_tok_s=speed, ttft_s=3 / speed, runs=()),
                memory=replace(NF4.memory, weight_bytes=size, quant_state_bytes=0, resident_bytes=size),
                fidelity=None if notation == "bf16" else Fidelity(prompt, text),
                layers=(EMBED, *blocks, HEAD),
            )
        )
    return comparison(cells=tuple(columns))
