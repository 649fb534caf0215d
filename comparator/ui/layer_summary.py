"""Layer rows → what a person wants to know of them: what is stored as what, and why a dtype says uint8.

Plain data and sentences, without HTML.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from comparator.backends import quantized_type
from comparator.core.result import CellResult, LayerRow
from comparator.util import formatting

_BYTES = {"uint8": 1, "int8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "int32": 4}
_COUNTED = {1: "one", 2: "two", 4: "four", 8: "eight"}


@dataclass(frozen=True)
class Kind:
    """All tensors of a column that are kept the same way."""

    words: str
    logical_dtype: str
    storage_dtype: str
    module_classes: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int
    quant_state_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * (self.bytes + self.quant_state_bytes) / self.parameters if self.parameters else None


def bits_of(logical_dtype: str) -> int | None:
    """Bits of a quantized type ("nf4", "int4 (GPTQ)"); None for a plain one."""
    quantized = quantized_type(logical_dtype)
    return quantized.bits if quantized else None


def in_words(row: LayerRow) -> str:
    """How one tensor is stored, as a phrase."""
    quantized = quantized_type(row.logical_dtype)
    if quantized is None:
        return f"plain {row.storage_dtype} numbers"
    if quantized.words:
        return quantized.words
    bits = quantized.bits
    slot = _BYTES.get(row.storage_dtype)
    count = slot * 8 // bits if slot else None
    container = "uint8 byte" if row.storage_dtype == "uint8" else row.storage_dtype
    if count and slot * 8 % bits == 0:
        return f"{bits}-bit values ({row.logical_dtype}), {_COUNTED.get(count, count)} in each {container}"
    return f"{bits}-bit values ({row.logical_dtype}), packed into {container}"


def kinds(rows: Iterable[LayerRow]) -> list[Kind]:
    """What is stored as what, the largest share first. A tied row has no bytes of its own and counts nowhere."""
    by_kind: dict[tuple, list[LayerRow]] = {}
    for row in rows:
        if not row.tied_to:
            by_kind.setdefault((in_words(row), row.logical_dtype, row.storage_dtype), []).append(row)
    summed = [
        Kind(
            *key,
            module_classes=tuple(dict.fromkeys(r.module_class for r in group)),
            tensors=len(group),
            parameters=sum(r.parameters for r in group),
            bytes=sum(r.bytes for r in group),
            quant_state_bytes=sum(r.quant_state_bytes for r in group),
        )
        for key, group in by_kind.items()
    ]
    return sorted(summed, key=lambda k: -k.parameters)


def average_bits(rows: Iterable[LayerRow]) -> float | None:
    """Bits per weight over the whole model, quant state included."""
    listed = list(rows)
    total = sum(r.parameters for r in listed)
    return 8 * sum(r.bytes + r.quant_state_bytes for r in listed) / total if total else None


def headline(cell: CellResult) -> str:
    """The column's storage in one or two sentences: is it really 4-bit?"""
    groups = kinds(cell.layers)
    total = sum(k.parameters for k in groups)
    if not total:
        return ""
    quantized = [k for k in groups if bits_of(k.logical_dtype)]
    average = formatting.figure(average_bits(cell.layers))
    if not quantized:
        listed = formatting.join(sorted({k.storage_dtype for k in groups}))
        return f"Nothing is quantized: every weight is stored in {listed}, {average} bits per weight."
    main = quantized[0]
    share = sum(k.parameters for k in quantized) / total
    rest = formatting.join(sorted({k.storage_dtype for k in groups if not bits_of(k.logical_dtype)}))
    left = (
        f" The other {formatting.percent(1 - share)} (embeddings, norms, skipped layers) stay in {rest}."
        if rest
        else ""
    )
    return (
        f"{formatting.percent(share)} of the weights are {main.logical_dtype} at {formatting.figure(main.bits_per_weight)} bits per "
        f"weight, scales included.{left} Over the whole model that is {average} bits per weight."
    )


def why_the_dtype(cell: CellResult) -> str:
    """The plain answer to "why does the dtype say uint8?", from this column's own tensors; "" where none arises."""
    row = next(
        (r for r in cell.layers if bits_of(r.logical_dtype) and r.logical_dtype != r.storage_dtype), None
    )
    if row is None:
        return ""
    bits = bits_of(row.logical_dtype)
    text = (
        f"Why does the dtype say {row.storage_dtype}? PyTorch has no {bits}-bit type, so the values are packed: "
        f"{in_words(row)}. {row.storage_dtype} is the type of the storage, {row.logical_dtype} that of the values in it. {row.name} means "
        f"{shape(row.shape)} values and is kept as {shape(row.storage_shape)} {row.storage_dtype}"
    )
    if row.parameters and row.quant_state_bytes:
        own, state = 8 * row.bytes / row.parameters, 8 * row.quant_state_bytes / row.parameters
        text += (
            f": {formatting.figure(own)} bits per weight, and {formatting.figure(state)} more for its scales"
        )
    return text + "."


def shape(sizes: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" for size in sizes) or "scalar"


@dataclass(frozen=True)
class Difference:
    """One tensor in two columns."""

    name: str
    left: LayerRow | None
    right: LayerRow | None

    @property
    def same(self) -> bool:
        return bool(self.left and self.right) and _storage(self.left) == _storage(self.right)


def _storage(row: LayerRow) -> tuple:
    return (
        row.logical_dtype,
        row.storage_dtype,
        row.storage_shape,
        row.bytes,
        row.quant_state_bytes,
        row.module_class,
    )


def diff(left: CellResult, right: CellResult) -> list[Difference]:
    """Tensor by tensor, in the left column's order; what only the right one has comes last."""
    others = {row.name: row for row in right.layers}
    pairs = [Difference(row.name, row, others.pop(row.name, None)) for row in left.layers]
    return pairs + [Difference(name, None, row) for name, row in others.items()]


def matches(row_text: str, query: str) -> bool:
    """Whether every word of the query stands somewhere in the row, whatever the case."""
    low = row_text.lower()
    return all(part in low for part in query.lower().split())
