"""The table of metrics: name, unit, which direction is better, how repeats are combined, where it is shown.

One entry drives the command line, CSV, Markdown, HTML, the page's tables, the matrix plot and the README's table.
Values are in base units (seconds, bytes, fractions of 1); the unit of an entry is the displayed one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from comparator.core.result import CellResult, Comparison, Energy, Memory, RunFigures
from comparator.util import formatting

Number = int | float

# key: the first table of the command line and of reports. summary: the page's table of all columns. latency, memory:
# the page's tabs and the sections of reports. loaded: the reports' memory section only. matrix: the choice of
# variants × adapters. progress: the line below a finished column on the command line.
Place = Literal["key", "summary", "latency", "memory", "loaded", "matrix", "progress"]

ARROWS = {"higher": "↑", "lower": "↓", None: ""}
LEGEND = "↑ higher is better, ↓ lower is better"

_COMBINE: dict[str, Callable[[Sequence[Number]], Number]] = {
    "median": statistics.median,
    "max": max,
    "first": lambda values: values[0],
}
_DISPLAY: dict[str, Callable[[Number], str]] = {
    "ms": lambda value: formatting.figure(value * 1e3),
    "MB": lambda value: formatting.megabytes(value, unit=False),
    "%": lambda value: f"{value * 100:.1f}",
    "nats": lambda value: (
        f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3f}"
    ),  # small ones never round to 0
}


@dataclass(frozen=True)
class Metric:
    """One metric of a column.

    key: name of the CSV column and of the field of `Latency`, `Memory` or `Energy` that holds the value; a key without
        a field is kept in `Latency.extra`. The suffix is the unit of the value.
    unit: the displayed unit; "" for none.
    over_repeats: how the values of repeated runs become one. "representative": from the run whose decode rate is
        nearest the median; None: no run measures it (loading, or derived from other metrics).
    value: computes a derived metric; None reads the field named by `key`.
    ratio: whether a ratio to the reference column means something.
    at_least: whether a column's value is a lower bound, which is then written ≥.
    """

    key: str
    title: str
    unit: str
    description: str
    better: Literal["higher", "lower"] | None = None
    shown: tuple[Place, ...] = ()
    over_repeats: Literal["median", "max", "first", "representative"] | None = "median"
    value: Callable[[CellResult], Number | None] | None = None
    ratio: bool = True
    at_least: Callable[[CellResult], bool] | None = None

    def get(self, result: CellResult) -> Number | None:
        """The value in base units; None where it was not measured."""
        return self.value(result) if self.value else _measured(result, self.key)

    def format(self, result: CellResult) -> str:
        """The value in the displayed unit, without it; "–" where it was not measured."""
        bound = "≥ " if self.at_least and self.at_least(result) else ""
        return bound + self.text(self.get(result))

    def text(self, value: Number | None) -> str:
        """A value in base units as text in the displayed unit, without it; "–" for None."""
        return formatting.NONE if value is None else _DISPLAY.get(self.unit, formatting.figure)(value)

    @property
    def unit_and_direction(self) -> str:
        """The displayed unit and which direction is better: tok/s ↑."""
        return f"{self.unit} {ARROWS[self.better]}".strip()

    @property
    def heading(self) -> str:
        """The title with unit and direction: decode, tok/s ↑."""
        return (
            f"{self.title}, {self.unit_and_direction}"
            if self.unit
            else f"{self.title} {ARROWS[self.better]}".strip()
        )

    @property
    def of_latency(self) -> bool:
        """Whether the value belongs to `Latency`."""
        return self.value is None and self.key not in _NOT_LATENCY


def shown(place: Place) -> list[Metric]:
    """The metrics shown in one place, in the table's order."""
    return [metric for metric in METRICS.values() if place in metric.shown]


def present(comparison: Comparison, *places: Place) -> list[Metric]:
    """The metrics shown in any of the places that at least one column has; without a place, of the whole table."""
    return [
        metric
        for metric in METRICS.values()
        if (not places or set(places) & set(metric.shown))
        and any(metric.get(cell) is not None for cell in comparison.cells)
    ]


def over_repeats(key: str, values: Iterable[Number | None]) -> Number | None:
    """The values of repeated runs combined by the metric's `over_repeats`; None if no run measured it."""
    combine = _COMBINE.get(METRICS[key].over_repeats or "")
    measured = [value for value in values if value is not None]
    return combine(measured) if combine and measured else None


def run_values(cell: CellResult, key: str) -> list[float]:
    """The values of a metric in each of the column's runs, without disturbed ones where there are others; empty where
    runs do not keep it."""
    runs = [run for run in cell.latency.runs if not run.disturbed] or cell.latency.runs
    values = (getattr(run, key) if key in _PER_RUN else run.extra.get(key) for run in runs)
    return [value for value in values if value is not None]


def stored_bytes(result: CellResult) -> int | None:
    """Bytes of weights and quant state: the same on every device, unlike resident bytes."""
    memory = result.memory
    return None if memory.weight_bytes is None else memory.weight_bytes + (memory.quant_state_bytes or 0)


def bits_per_weight(result: CellResult) -> float | None:
    """8 × stored bytes / parameters over the whole model, a tied tensor counted once."""
    total, parameters = stored_bytes(result), sum(r.parameters for r in result.layers if r.tied_to is None)
    return 8 * total / parameters if total is not None and parameters else None


def mbu(result: CellResult) -> float | None:
    """Memory bandwidth utilization, 0 to 1: decode rate over the roofline."""
    rate, roofline = result.latency.decode_tok_s, result.latency.floor_tok_s
    return rate / roofline if rate and roofline else None


def python_overhead_s(result: CellResult) -> float | None:
    """Seconds per token that eager decoding takes longer than the column's own decode path."""
    ours, eager = result.latency.decode_tok_s, result.latency.eager_decode_tok_s
    return 1 / eager - 1 / ours if ours and eager else None


def thinking_tokens(result: CellResult) -> int | None:
    return result.thinking.tokens if result.thinking else None


def answer_ttft_s(result: CellResult) -> float | None:
    """Seconds from the prompt's ids to the first token after the thinking; None where the answer never began."""
    thought, latency = thinking_tokens(result), result.latency
    if thought is None or latency.ttft_s is None or not thought <= len(latency.itl_s):
        return None
    return latency.ttft_s + sum(latency.itl_s[:thought])


def _measured(result: CellResult, key: str) -> Number | None:
    for part in (result.latency, result.memory, result.energy):
        if hasattr(part, key):
            return getattr(part, key)
    return result.latency.extra.get(key)


def _text(*path: str) -> Callable[[CellResult], Number | None]:
    """Reads a number of `fidelity.text` by its keys; None if there is none."""

    def get(result: CellResult) -> Number | None:
        value: Any = result.fidelity.text if result.fidelity else None
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    return get


def _prompt_kl(result: CellResult) -> float | None:
    prompt = result.fidelity.prompt if result.fidelity else None
    return statistics.fmean(prompt.kl) if prompt and prompt.kl else None


def kl_at_least(result: CellResult) -> bool:
    """Whether the divergence on the answer is a lower bound: of a column that gives the most likely tokens only."""
    prompt = result.fidelity.prompt if result.fidelity else None
    return bool(prompt and prompt.kl and prompt.at_least)


def _prompt_agreement(result: CellResult) -> float | None:
    prompt = result.fidelity.prompt if result.fidelity else None
    return statistics.fmean(rank == 0 for rank in prompt.rank) if prompt and prompt.rank else None


def _drift(name: str) -> Callable[[CellResult], float | None]:
    def get(result: CellResult) -> float | None:
        drift = result.fidelity.adapter if result.fidelity else None
        return getattr(drift, name) if drift else None

    return get


_PER_RUN = {field.name for field in fields(RunFigures)} - {"extra", "interference"}
_NOT_LATENCY = {field.name for part in (Memory, Energy) for field in fields(part)}

METRICS: dict[str, Metric] = {metric.key: metric for metric in (
    Metric("decode_tok_s", "decode", "tok/s", "Tokens after the first divided by the time from the first token to the last: "
           "(n − 1) / (t_n − t_1).", "higher", ("key", "summary", "latency", "matrix", "progress")),
    Metric("mbu", "MBU", "%", "Memory bandwidth utilization: decode rate divided by the roofline. – on a CPU.",
           "higher", ("latency", "matrix"), None, mbu, ratio=False),
    Metric("floor_tok_s", "roofline", "tok/s", "The decode rate if reading the weights once per token took the full memory bandwidth, which is measured with a copy on this GPU; keys and values are not counted.",
           shown=("matrix",), ratio=False),
    Metric("eager_decode_tok_s", "eager decode", "tok/s", "The same answer decoded step by step from Python, as plain "
           "transformers does, measured in the same comparison.", "higher", ("latency", "matrix")),
    Metric("python_overhead_s", "Python overhead", "ms", "How much longer a token takes when it is decoded eagerly.",
           shown=("latency", "matrix"), over_repeats=None, value=python_overhead_s, ratio=False),
    Metric("ttft_s", "TTFT", "ms", "Time to first token: from the prompt's token ids to the first new id on the host, "
           "the device synchronized. Loading, tokenizing and the warm-up are not included.",
           "lower", ("key", "summary", "latency", "matrix", "progress")),
    Metric("thinking_tokens", "thinking", "tokens", "Tokens between the model's thinking tags, which are counted in. – where "
           "the answer has none.", None, ("key", "latency", "progress"), None, thinking_tokens, ratio=False),
    Metric("answer_ttft_s", "TTFT of the answer", "ms", "Time to the first token after the thinking.",
           "lower", ("latency",), None, answer_ttft_s, ratio=False),
    Metric("prefill_tok_s", "prefill", "tok/s", "Prompt tokens divided by TTFT.", "higher", ("latency", "matrix")),
    Metric("itl_p50_s", "ITL p50", "ms", "Median inter-token latency: half of the tokens after the first took less.",
           "lower", ("latency", "matrix"), "representative"),
    Metric("itl_p90_s", "ITL p90", "ms", "90 % of the tokens after the first took less.",
           "lower", ("latency", "matrix"), "representative"),
    Metric("itl_p99_s", "ITL p99", "ms", "99 % of the tokens after the first took less.",
           "lower", ("latency", "matrix"), "representative"),
    Metric("round_trip_s", "round trip", "ms", "Of a small request to the server of an endpoint, the median of five over an open connection: the network's part of TTFT.", "lower", ("latency",), ratio=False),
    Metric("total_s", "total", "s", "From the prompt's token ids to the last token; answers differ in length, so "
           "there is no ratio.", "lower", ("latency", "matrix"), ratio=False),
    Metric("load_s", "load", "s", "Reading and quantizing the weights; – where the variant was already resident.",
           "lower", ("latency",), None),
    Metric("prepare_s", "prepare", "s", "Warm-up, kernel compilation and graph capture; not included in any other time.",
           "lower", ("latency", "matrix"), None),
    Metric("adapter_load_s", "adapter load", "s", "Reading the adapter and fitting it to the resident base; – where it "
           "was already loaded.", "lower", ("latency", "matrix"), None, ratio=False),
    Metric("adapter_switch_s", "adapter switch", "ms", "Activating a loaded adapter and deactivating it again.",
           "lower", ("latency", "matrix"), ratio=False),
    Metric("resident_bytes", "resident", "MB", "All memory of the variant on its device after the warm-up.",
           "lower", ("key", "summary", "memory", "matrix", "progress"), None),
    Metric("shared_bytes", "shared tensors", "MB", "The part of resident memory that is shared with a variant loaded earlier: tensors that are bit-identical and stored once for both.",
           shown=("memory", "matrix"), over_repeats=None, ratio=False),
    Metric("weight_bytes", "weights", "MB", "Parameters and persistent buffers, each storage once, without quant state.",
           "lower", ("memory", "matrix"), None),
    Metric("quant_state_bytes", "quant state", "MB", "Data that dequantization needs: absmax, codebooks, nested state, scales, "
           "zeros, g_idx.", "lower", ("memory", "matrix"), None, ratio=False),
    Metric("stored_bytes", "weights + quant state", "MB", "The size of the model as it is stored on the device.",
           "lower", ("memory", "matrix"), None, stored_bytes),
    Metric("bits_per_weight", "bits/weight", "", "8 × (weights + quant state) / parameters, over the whole model.",
           "lower", ("key", "matrix"), None, bits_per_weight),
    Metric("adapter_bytes", "adapter", "MB", "What the adapter adds.",
           "lower", ("memory", "matrix"), None, ratio=False),
    Metric("kv_cache_bytes", "KV cache", "MB", "Keys and values of the prompt and the answer at the end of the run.",
           "lower", ("memory", "matrix"), "first", ratio=False),
    Metric("run_peak_bytes", "run peak", "MB", "Peak use during generation; read from the allocator on CUDA, from the process on a CPU.", "lower", ("memory", "matrix"), "max"),
    Metric("load_peak_bytes", "load peak", "MB", "Peak use during loading.",
           "lower", ("memory", "matrix"), None),
    Metric("loaded_weight_bytes", "weights as loaded", "MB", "Weights right after loading, before a library repacked "
           "them at first use.", "lower", ("loaded",), None),
    Metric("loaded_quant_state_bytes", "quant state as loaded", "MB", "Quant state right after loading.",
           "lower", ("loaded",), None, ratio=False),
    Metric("footprint_bytes", "get_memory_footprint()", "MB", "What transformers' function returns: parameters and "
           "buffers, without quant state that is neither.", "lower", ("memory",), None),
    Metric("joules_per_token", "energy", "J/token", "Energy per new token as the GPU reports it (NVML).",
           "lower", ("latency", "matrix")),
    Metric("prompt_kl_mean", "KL (answer)", "nats", "Mean of KL(reference ‖ variant) over the reference's own answer, the reference's tokens forced, one per step. ≥: a lower bound, from a server that returns only the most likely tokens.",
           "lower", ("key", "summary", "matrix"), None, _prompt_kl, ratio=False, at_least=kl_at_least),
    Metric("prompt_agreement", "agrees (answer)", "%", "Share of the reference's tokens that are also this variant's greedy choice.", "higher", ("key", "summary", "matrix"), None, _prompt_agreement, ratio=False),
    Metric("adapter_drift", "adapter drift", "nats", "How far the adapter's effect here is from its effect on the "
           "reference base, over the reference's answer: mean KL(reference with it ‖ reference with the effect that it "
           "has here). 0: it does the same.", "lower", ("key", "matrix"), None, _drift("kl"), ratio=False),
    Metric("adapter_effect", "adapter effect", "nats", "Mean KL(base with the adapter ‖ base without) over the "
           "reference's answer: how much it changes here.",
           shown=("matrix",), over_repeats=None, value=_drift("effect_here"), ratio=False),
    Metric("text_kl_mean", "KL (text)", "nats", "Mean KL(reference ‖ variant) over the evaluation text.",
           "lower", ("key", "matrix"), None, _text("kl", "mean"), ratio=False),
    Metric("text_kl_se", "± KL (text)", "nats", "Standard error of that mean.",
           shown=("matrix",), over_repeats=None, value=_text("kl", "se"), ratio=False),
    Metric("text_ppl", "perplexity (text)", "", "exp of the mean negative log-likelihood of the evaluation text.",
           "lower", ("matrix",), None, _text("ppl"), ratio=False),
    Metric("text_top1", "agrees (text)", "%", "Share of positions where both have the same most likely token.",
           "higher", ("key", "matrix"), None, _text("top1", "mean"), ratio=False),
)}  # fmt: skip
