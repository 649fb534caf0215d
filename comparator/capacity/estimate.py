"""What a model would hold and how fast it could decode, variant by variant, on a card: an estimate from headers alone.

The weights are `Backend.tensor_sizes`, by whose sum the pool and training refuse what cannot fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from comparator.backends import backend_for, methods, own_variant, resolve
from comparator.backends.base import TensorSize
from comparator.backends.options import CACHE_BITS, KV_CACHE
from comparator.backends.sizes import FLOAT_BYTES, as_stored
from comparator.capacity import kv_cache
from comparator.capacity.cards import Card
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.metrics.memory import RESERVE_BYTES
from comparator.sources import Checkpoint
from comparator.sources.dimensions import Dimensions, dimensions

LABEL = "Estimate, not a measurement"
CUDA_CONTEXT_BYTES = 512 * 2**20  # the driver's own, of a process that uses a GPU
CUBLAS_BYTES = 32 * 2**20  # the workspace that PyTorch gives cuBLAS on Hopper; less elsewhere
LONGEST = 2**24  # tokens; no model is made for more
_EMBEDDING = re.compile(r"embed|\bw[tp]e\b|token_embd")
_EXPERT = re.compile(r"\.experts\.")


@dataclass(frozen=True)
class Row:
    """One variant, in bytes. `kv_bytes`: of all users together. `graph_bytes`: what a captured decode step holds for itself.
    `longest_context`: tokens per user that still fit, None where not even the weights do. `tok_s`: the roofline of all users
    together; None where the card's bandwidth is not known. `error`: why there is no estimate."""

    variant: str
    weight_bytes: int = 0
    state_bytes: int = 0
    kv_bytes: int = 0
    activation_bytes: int = 0
    graph_bytes: int = 0
    reserve_bytes: int = 0
    total_bytes: int = 0
    fits: bool = False
    longest_context: int | None = None
    tok_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Plan:
    """`context`: tokens of prompt and answer of each of `users` sequences. `cache`: what kinds of layers hold keys and values."""

    model: str
    parameters: int
    card: Card
    context: int
    users: int
    decode: str
    cache: str
    cache_token_bytes: int
    trained_context: int | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"label": LABEL, **asdict(self)}


def plan(
    checkpoint: Checkpoint,
    card: Card,
    context: int,
    users: int = 1,
    variants: Iterable[Variant] = (),
    decode: str | None = None,
) -> Plan:
    """Estimate each variant, or without any each method that can be made of the checkpoint. decode: "graph" counts the cache
    that a captured step keeps for itself, "eager" does not; None: graph on CUDA, as a run here. Raises `UserError` for a
    context or users that make no sense."""
    if not 0 < context <= LONGEST or not 0 < users <= 100_000:
        raise UserError(
            f"A context of {context:,} tokens for {users:,} users is out of range.",
            f"Contexts go up to {LONGEST:,}.",
        )
    decode = decode or ("graph" if card.device == "cuda" else "eager")
    chosen = list(variants) or default_variants(checkpoint, card.device)
    rows = tuple(_row(checkpoint, variant, card, context, users, decode) for variant in chosen)
    cache = kv_cache.geometry(checkpoint)
    return Plan(
        model=checkpoint.source,
        parameters=checkpoint.parameters,
        card=card,
        context=context,
        users=users,
        decode=decode,
        cache=cache.words(),
        cache_token_bytes=cache.token_bytes,
        trained_context=checkpoint.context_length,
        rows=rows,
        notes=tuple(_notes(checkpoint, cache, context)),
    )


def default_variants(checkpoint: Checkpoint, device: str) -> list[Variant]:
    """Of a full-precision checkpoint every ready notation of methods that start from one and run on `device`; of a quantized one
    itself."""
    if checkpoint.quantization:
        own = own_variant(checkpoint.facts())
        return [own] if own else []
    names = [
        n
        for backend, method in methods().values()
        for n in method.ready_notations
        if backend.source_kind == "checkpoint" and not (device == "cuda" and backend.cpu_only)
    ]
    return [resolve(name) for name in dict.fromkeys([*names, *([] if device == "cuda" else ["gguf:q4_k_m"])])]


def _row(checkpoint: Checkpoint, variant: Variant, card: Card, context: int, users: int, decode: str) -> Row:
    try:
        return _estimated(checkpoint, variant, card, context, users, decode)
    except UserError as problem:
        return Row(variant.notation, error=problem.problem)


def _estimated(
    checkpoint: Checkpoint, variant: Variant, card: Card, context: int, users: int, decode: str
) -> Row:
    backend = backend_for(variant)
    if card.device != "cuda" and backend.needs_cuda(variant):
        raise UserError(f"{variant.notation} runs on an NVIDIA GPU only.")
    if card.device == "cuda" and backend.cpu_only:
        raise UserError(f"{variant.notation} is computed on the CPU: {backend.cpu_only}.")
    own = checkpoint.quantization is not None
    if own:
        sizes = as_stored(checkpoint)
    else:
        if variant.source:
            raise UserError(
                f"{variant.notation} is a separate checkpoint: plan {variant.source} as the model."
            )
        variant = backend.complete(variant, checkpoint)
        sizes = list(backend.tensor_sizes(variant, checkpoint, card.device))
    dtype = "bf16" if own else backend.compute_dtype(variant, checkpoint)
    size, cache = dimensions(checkpoint), kv_cache.geometry(checkpoint, dtype)
    reserve = RESERVE_BYTES + (CUDA_CONTEXT_BYTES if card.device == "cuda" else 0)
    row = Row(
        variant.notation,
        weight_bytes=sum(s.weight_bytes + s.copy_bytes for s in sizes),
        state_bytes=sum(s.state_bytes for s in sizes),
        reserve_bytes=reserve,
    )

    kind = backend.requested(variant).get(KV_CACHE.name)
    share = CACHE_BITS[kind] / (8 * FLOAT_BYTES[dtype]) if kind else 1.0
    captured = decode == "graph" and backend.runtime == "transformers" and not kind

    def at(tokens: int) -> Row:
        kv = math.ceil(users * cache.bytes(tokens) * share)
        graph = users * cache.bytes(_bucket(tokens)) if captured else 0
        read = users * tokens
        workspace = backend.workspace_bytes(variant, read, size.inner, size.hidden, card.device)
        activations = activation_bytes(size, read, users, FLOAT_BYTES[dtype], workspace)
        activations += CUBLAS_BYTES if card.device == "cuda" else 0
        total = row.weight_bytes + row.state_bytes + kv + graph + activations + reserve
        return replace(
            row,
            kv_bytes=kv,
            graph_bytes=graph,
            activation_bytes=activations,
            total_bytes=total,
            fits=total <= card.memory_bytes,
        )

    return replace(
        at(context),
        longest_context=_longest(lambda tokens: at(tokens).fits, checkpoint.context_length or LONGEST),
        tok_s=roofline(sizes, checkpoint, size, card, users, math.ceil(users * cache.bytes(context) * share)),
    )


def activation_bytes(size: Dimensions, tokens: int, users: int, width: int, workspace: int = 0) -> int:
    """The most that one forward pass over `tokens` tokens in all holds at once, with `width` bytes per value.

    The embeddings, the layer's input, the residual and the MLP's input lie there throughout. Beside these: activated gate, up
    and their product; or gate, up and `workspace` bytes of the matmul that makes it; or what attention takes. And the last
    logits of `users` sequences, once in fp32."""
    throughout = 4 * size.hidden
    product = tokens * (throughout + 3 * size.inner) * width
    matmul = tokens * (throughout + 2 * size.inner) * width + workspace
    attention = tokens * (throughout + 6 * size.hidden) * width
    return max(product, matmul, attention) + users * size.vocabulary * (width + 4)


def roofline(
    sizes: list[TensorSize], checkpoint: Checkpoint, size: Dimensions, card: Card, users: int, kv_bytes: int
) -> float | None:
    """Tokens per second of all users together if a step reads each weight once and every user's cache, at the card's whole
    bandwidth. Of an embedding that is not the head too a row is read, and of experts those that the users' tokens take."""
    if not card.bytes_s:
        return None
    return users * card.bytes_s / (step_bytes(sizes, checkpoint, size, users) + kv_bytes)


def step_bytes(sizes: list[TensorSize], checkpoint: Checkpoint, size: Dimensions, users: int) -> int:
    """Bytes of weights and quant state that one decode step reads, caches aside."""
    share = 1 - (1 - size.experts_per_token / size.experts) ** users if size.experts else 1.0
    total = 0.0
    for tensor in sizes:
        stored = tensor.weight_bytes + tensor.state_bytes
        if _EXPERT.search(tensor.name):
            total += share * stored
        elif checkpoint.tied or not _EMBEDDING.search(tensor.name):
            total += stored
    return round(total)


def _longest(fits: Any, most: int) -> int | None:
    """The largest number of tokens up to `most` for which `fits(tokens)`, which is monotonic; None where not one token does."""
    if not fits(1):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _bucket(tokens: int) -> int:
    from comparator.decoding.static_state import bucket

    return bucket(tokens)


def _notes(checkpoint: Checkpoint, cache: kv_cache.Geometry, context: int) -> Iterator[str]:
    if not cache.exact:
        yield "transformers could not determine this model's cache: full attention in every layer is assumed."
    if checkpoint.context_length and context > checkpoint.context_length:
        yield f"The model's context length is {checkpoint.context_length:,} tokens; beyond it answers degrade."
    if checkpoint.quantization:
        yield "The checkpoint is already quantized: its size is that of the tensors in its files."
    if checkpoint.note:
        yield checkpoint.note
