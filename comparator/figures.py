"""The figures of a column: what each is called, how it is written, and what it is beside the reference's.

One table for the terminal, CSV, Markdown, HTML and the README. Pure: knows nothing of a page, a file or torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from comparator import devices, verdict, words
from comparator.metrics.latency import cannot_tell
from comparator.types import CellName, CellResult, Comparison
from comparator.verdict import bits_per_weight

Number = int | float


@dataclass(frozen=True)
class Figure:
    """One figure of a column. `key` carries the unit of `get`'s value; `unit` is that of the written form."""

    key: str
    title: str
    unit: str
    help: str
    get: Callable[[CellResult], Number | None]
    write: Callable[[Number | None], str]
    better: Literal["more", "less"] | None = None
    runs: str | None = None  # the field of `RunFigures` that holds one value per repeat
    ratio: bool = True

    def written(self, result: CellResult) -> str:
        """The value without its unit; "–" where it was not measured."""
        return self.write(self.get(result))


def _plain(value: Number | None) -> str:
    return words.figure(value)


def _milliseconds(value: Number | None) -> str:
    return words.figure(None if value is None else value * 1e3)


def _megabytes(value: Number | None) -> str:
    return words.megabytes(value, unit=False)


def _share(value: Number | None) -> str:
    return words.NONE if value is None else f"{value * 100:.1f}"


def _small(value: Number | None) -> str:
    """Divergences: two digits that matter, never rounded to 0."""
    return words.NONE if value is None else f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3f}"


def _latency(name: str) -> Callable[[CellResult], Any]:
    return lambda result: getattr(result.latency, name)


def floor_share(result: CellResult) -> float | None:
    """Decode rate over the bandwidth floor, 0 to 1; None where either was not measured."""
    rate, floor = result.latency.decode_tok_s, result.latency.floor_tok_s
    return rate / floor if rate and floor else None


def python_s(result: CellResult) -> float | None:
    """Seconds a token that decoding eagerly takes more than the column's own path: what Python costs."""
    ours, eager = result.latency.decode_tok_s, result.latency.eager_decode_tok_s
    return 1 / eager - 1 / ours if ours and eager else None


def _memory(name: str) -> Callable[[CellResult], Any]:
    return lambda result: getattr(result.memory, name)


def _text(*path: str) -> Callable[[CellResult], Any]:
    """A figure out of `fidelity.text`, whose shape may grow; None where it is not a number."""

    def get(result: CellResult) -> Number | None:
        value: Any = result.fidelity.text if result.fidelity else None
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    return get


def _prompt_kl(result: CellResult) -> float | None:
    prompt = result.fidelity.prompt if result.fidelity else None
    return statistics.fmean(prompt.kl) if prompt and prompt.kl else None


def _prompt_agreement(result: CellResult) -> float | None:
    prompt = result.fidelity.prompt if result.fidelity else None
    return statistics.fmean(rank == 0 for rank in prompt.rank) if prompt and prompt.rank else None


def _drift(name: str) -> Callable[[CellResult], float | None]:
    def get(result: CellResult) -> float | None:
        drift = result.fidelity.adapter if result.fidelity else None
        return getattr(drift, name) if drift else None

    return get


FIGURES: tuple[Figure, ...] = (
    Figure("decode_tok_s", "decode", "tok/s", "Tokens after the first over the time from the first token to the "
           "last: (n − 1) / (t_n − t_1).", _latency("decode_tok_s"), _plain, "more", "decode_tok_s"),
    Figure("floor_share", "of the floor", "%", "Decode rate over the bandwidth floor: the tokens a second that reading the "
           "weights once a token allows, at the rate that a copy on this GPU reaches. – on a CPU.", floor_share, _share,
           "more", ratio=False),
    Figure("floor_tok_s", "bandwidth floor", "tok/s", "What reading the weights once a token allows at the rate that a copy "
           "on this GPU reaches; keys and values are not counted.", _latency("floor_tok_s"), _plain, ratio=False),
    Figure("eager_decode_tok_s", "decode, eager", "tok/s", "The same answer decoded step by step from Python, as plain "
           "transformers does, measured in the same comparison.", _latency("eager_decode_tok_s"), _plain, "more"),
    Figure("ttft_s", "TTFT", "ms", "Time to first token: from the prompt's token ids to the first new id on the "
           "host, the device synchronized. Loading, tokenizing and the warm-up are outside.",
           _latency("ttft_s"), _milliseconds, "less", "ttft_s"),
    Figure("prefill_tok_s", "prefill", "tok/s", "Prompt tokens over TTFT.", _latency("prefill_tok_s"), _plain, "more"),
    Figure("itl_p50_s", "ITL p50", "ms", "Median inter-token latency: half of the tokens after the first took less.",
           _latency("itl_p50_s"), _milliseconds, "less"),
    Figure("itl_p90_s", "ITL p90", "ms", "Nine of ten tokens after the first took less.",
           _latency("itl_p90_s"), _milliseconds, "less"),
    Figure("itl_p99_s", "ITL p99", "ms", "99 of 100 tokens after the first took less.",
           _latency("itl_p99_s"), _milliseconds, "less"),
    Figure("total_s", "total", "s", "From the prompt's token ids to the last token; answers differ in "
           "length, so no ratio.", _latency("total_s"), _plain, "less", ratio=False),
    Figure("load_s", "load", "s", "Reading and quantizing the weights; – where the variant was already resident.",
           _latency("load_s"), _plain, "less"),
    Figure("prepare_s", "prepare", "s", "Warm-up, kernel compilation and graph capture, outside every other time.",
           _latency("prepare_s"), _plain, "less"),
    Figure("adapter_load_s", "adapter load", "s", "Reading the adapter and fitting it to the resident base; – where it "
           "was there already.", _latency("adapter_load_s"), _plain, "less", ratio=False),
    Figure("adapter_switch_s", "adapter switch", "ms", "Putting a fitted adapter on and taking it off again.",
           _latency("adapter_switch_s"), _milliseconds, "less", ratio=False),
    Figure("resident_bytes", "resident", "MB", "Everything the variant holds on its device after the warm-up.",
           _memory("resident_bytes"), _megabytes, "less"),
    Figure("shared_bytes", "of it shared", "MB", "Of what is resident: tensors that a variant loaded earlier holds too, bit "
           "for bit the same and one storage for both.", _memory("shared_bytes"), _megabytes, ratio=False),
    Figure("weight_bytes", "weights", "MB", "Parameters and persistent buffers, each storage once, without quant state.",
           _memory("weight_bytes"), _megabytes, "less"),
    Figure("quant_state_bytes", "quant state", "MB", "What unpacking the weights needs: absmax, codebooks, nested "
           "state, scales, zeros, g_idx.", _memory("quant_state_bytes"), _megabytes, "less", ratio=False),
    Figure("bits_per_weight", "bits/weight", "", "8 × (weights + quant state) / parameters, over the whole model.",
           bits_per_weight, _plain, "less"),
    Figure("adapter_bytes", "adapter", "MB", "What the adapter adds.", _memory("adapter_bytes"), _megabytes, "less",
           ratio=False),
    Figure("kv_cache_bytes", "KV cache", "MB", "Keys and values of the prompt and the answer at the end of the run.",
           _memory("kv_cache_bytes"), _megabytes, "less", ratio=False),
    Figure("run_peak_bytes", "run peak", "MB", "The highest use while this run generated; read from the allocator on "
           "CUDA, from the process on a CPU.", _memory("run_peak_bytes"), _megabytes, "less"),
    Figure("load_peak_bytes", "load peak", "MB", "The highest use while it was loaded.",
           _memory("load_peak_bytes"), _megabytes, "less"),
    Figure("loaded_weight_bytes", "weights as loaded", "MB", "Weights right after loading, before a library repacked "
           "them at first use.", _memory("loaded_weight_bytes"), _megabytes, "less"),
    Figure("loaded_quant_state_bytes", "quant state as loaded", "MB", "Quant state right after loading.",
           _memory("loaded_quant_state_bytes"), _megabytes, "less", ratio=False),
    Figure("footprint_bytes", "get_memory_footprint()", "MB", "What transformers' function returns: parameters and "
           "buffers without bitsandbytes' quant state.", _memory("footprint_bytes"), _megabytes, "less"),
    Figure("joules_per_token", "energy", "J/token", "Energy per new token as the GPU reports it (NVML).",
           lambda r: r.energy.joules_per_token if r.energy else None, _plain, "less"),
    Figure("prompt_kl_mean", "KL (answer)", "nats", "Mean over the reference's own answer of KL(reference ‖ column), "
           "the reference's tokens forced, one a step.", _prompt_kl, _small, "less", ratio=False),
    Figure("prompt_agreement", "agrees (answer)", "%", "Share of the reference's tokens that are this column's "
           "greedy choice too.", _prompt_agreement, _share, "more", ratio=False),
    Figure("adapter_drift", "drift of the adapter", "nats", "How far the adapter's effect here is from its effect on the "
           "reference base, over the reference's answer: mean KL(reference with it ‖ reference with the effect that it "
           "has here). 0: it does the same.", _drift("kl"), _small, "less", ratio=False),
    Figure("adapter_effect", "effect of the adapter", "nats", "Mean KL(base with the adapter ‖ base without) over the "
           "reference's answer: how much it changes here.", _drift("effect_here"), _small, ratio=False),
    Figure("text_kl_mean", "KL (text)", "nats", "Mean KL(reference ‖ column) over the evaluation text.",
           _text("kl", "mean"), _small, "less", ratio=False),
    Figure("text_kl_se", "± KL (text)", "nats", "Standard error of that mean.", _text("kl", "se"), _small, ratio=False),
    Figure("text_ppl", "perplexity (text)", "", "exp of the mean negative log-likelihood of the evaluation text.",
           _text("ppl"), _plain, "less", ratio=False),
    Figure("text_top1", "agrees (text)", "%", "Share of positions where both put the same token first.",
           _text("top1", "mean"), _share, "more", ratio=False),
)  # fmt: skip
BY_KEY = {figure.key: figure for figure in FIGURES}

# What a first look needs; those that no column has are left out of a table.
KEY = ("decode_tok_s", "ttft_s", "resident_bytes", "bits_per_weight", "prompt_kl_mean", "prompt_agreement",
       "adapter_drift", "text_kl_mean", "text_top1")  # fmt: skip
LATENCY = ("load_s", "prepare_s", "ttft_s", "prefill_tok_s", "decode_tok_s", "floor_share", "eager_decode_tok_s",
           "itl_p50_s", "itl_p90_s", "itl_p99_s",
           "total_s", "adapter_load_s", "adapter_switch_s", "joules_per_token")  # fmt: skip
MEMORY = ("loaded_weight_bytes", "loaded_quant_state_bytes", "weight_bytes", "quant_state_bytes", "adapter_bytes",
          "resident_bytes", "shared_bytes", "kv_cache_bytes", "run_peak_bytes", "load_peak_bytes", "footprint_bytes")  # fmt: skip


def present(comparison: Comparison, keys: tuple[str, ...]) -> list[Figure]:
    """Those of the figures that at least one column has."""
    return [
        BY_KEY[key] for key in keys if any(BY_KEY[key].get(cell) is not None for cell in comparison.cells)
    ]


def reference_of(comparison: Comparison, cell: CellResult) -> CellResult | None:
    """The column that `cell` stands beside: the reference variant with the same adapter, else the reference.

    None for the reference itself, and where there is none.
    """
    found = verdict.reference_of(comparison, cell)
    if found is not cell or is_reference(comparison.reference, cell):
        return None if found is cell else found
    return comparison.cell(comparison.reference.variant, comparison.reference.adapter)


def is_reference(name: CellName | None, cell: CellResult) -> bool:
    return name is not None and (cell.variant, cell.adapter) == (name.variant, name.adapter)


def ratio(comparison: Comparison, cell: CellResult, figure: Figure) -> float | None:
    """The column's figure over the reference's; None where either is missing or a ratio says nothing."""
    reference = reference_of(comparison, cell)
    return words.ratio(figure.get(cell), figure.get(reference)) if figure.ratio and reference else None


def within_spread(comparison: Comparison, cell: CellResult, figure: Figure) -> bool:
    """Whether the repeats of both columns overlap in this figure, so that no difference can be told."""
    reference = reference_of(comparison, cell)
    if reference is None or figure.runs is None:
        return False
    mine, its = (
        [v for run in c.latency.runs if (v := getattr(run, figure.runs)) is not None]
        for c in (cell, reference)
    )
    return len(mine) > 1 and len(its) > 1 and cannot_tell(mine, its)


def beside(comparison: Comparison, cell: CellResult, figure: Figure) -> str:
    """What stands beside a figure: "×0.48", "×0.98 can't tell", or nothing."""
    mark = devices.mark(cell, reference_of(comparison, cell))
    share = words.times(ratio(comparison, cell, figure), mark)
    return f"{share} can't tell" if share and within_spread(comparison, cell, figure) else share


def stored_as(result: CellResult) -> list[str]:
    """What is stored as what, a line a kind: "210 × nf4 in uint8, 53.1 MB, 4.25 bits a weight"."""
    groups: dict[tuple[str, str, str], list] = {}
    for row in result.layers:
        if row.tied_to is None:
            groups.setdefault((row.logical_dtype, row.storage_dtype, row.module_class), []).append(row)
    lines = []
    for (logical, storage, module), rows in sorted(groups.items(), key=lambda g: -sum(r.bytes for r in g[1])):
        total = sum(r.bytes + r.quant_state_bytes for r in rows)
        bits = words.ratio(8 * total, sum(r.parameters for r in rows))
        kind = logical if logical == storage else f"{logical} in {storage}"
        lines.append(
            f"{len(rows)} × {kind} ({module}): {words.megabytes(total)}, {words.figure(bits)} bits a weight"
        )
    return lines
