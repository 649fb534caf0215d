"""Fused kernels for the operations between a step's matmuls: RMSNorm, the rotary embedding, and one token's attention.

transformers runs eight small kernels per norm and ten per rotary embedding, and its attention over a static cache reads
the padding too. In a captured step a norm takes three, a rotation one and attention two; weight matmuls, eager decoding
and prefill stay the library's own.

`find` runs one step on the library's own path and each kernel on the same activations; only kernels that agree within
rounding are used.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from comparator.decoding.patching import replace_forward
from comparator.util import error_log, formatting
from comparator.util.compat import transformers as compat

if TYPE_CHECKING:
    from comparator.decoding.static_state import StaticDecodeState

# Up to this many slots the library's attention is used for one sequence: norms and rotations are bit-identical to eager ones, attention
# in another order is not. Beyond, the library's would cost more than all other operations between the matmuls: it reads
# the padding, with one program per head.
EXACT_SLOTS = 1024
# ‖kernel − own‖ / ‖own‖ that rounding explains. It is 0 for norms and rotations that round as transformers' Llama does;
# attention rounds the softmax before the last product, as fused kernels do.
LIMIT = {"norm": 0.002, "rotation": 0.002, "attention": 0.01}
LIMIT_32 = {"norm": 1e-5, "rotation": 1e-5, "attention": 1e-4}
WORDS = {"norm": "norms", "rotation": "the rotary embedding", "attention": "attention"}
_NORM = "RMSNorm"
_ROTATION = "apply_rotary_pos_emb"
_ATTENTION = "sdpa"


@dataclass(frozen=True)
class Fused:
    """Operations of a model that can be fused. `norms`: modules; `rotations`: Python modules whose function is replaced;
    `attentions`: transformers' tables of attention functions."""

    norms: tuple[Any, ...] = ()
    rotations: tuple[Any, ...] = ()
    attentions: tuple[Any, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the column."""
        places = {"norm": self.norms, "rotation": self.rotations, "attention": self.attentions}
        names = [WORDS[kind] for kind, modules in places.items() if modules]
        if not names:
            return ()
        return (
            f"Fused kernels of this project compute {formatting.join(names)}; weight matmuls use the library's own kernels.",
        )

    def of(self, capacity: int, compiled: bool, exact: bool = True) -> Fused:
        """The operations to fuse in a step of `capacity` slots. torch.compile fuses norms and rotations itself.
        `exact`: the step can be bit-identical to eager decoding (one sequence, `repeats`)."""
        if compiled:
            return Fused(attentions=self.attentions)
        return self if capacity > EXACT_SLOTS or not exact else Fused(self.norms, self.rotations)


def repeats(model: Any) -> bool:
    """Whether eager decoding is bit-identical each time."""
    from comparator.backends import owner

    return all(backend.deterministic(m) for m in model.modules() if (backend := owner(m)) is not None)


class _Distances:
    """The largest distance of each candidate; infinite where the kernel does not apply."""

    def __init__(self) -> None:
        self._by_kind: dict[str, dict[int, tuple[Any, float]]] = {kind: {} for kind in LIMIT}

    def measure(self, kind: str, place: Any, kernel: Callable[[], Any], own: Any) -> Any:
        """Record the distance of `kernel()` from the library's result `own`, which is returned. A kernel that fails (on a
        card that its compiler does not know, say) is not used."""
        distances = self._by_kind[kind]
        try:
            distance = _distance(kernel(), own)
        except Exception as error:
            distance = float("inf")
            if not distances and not isinstance(error, _NoKernel):
                error_log.fallback(f"decode without the fused kernel for {WORDS[kind]}", error)
        distances[id(place)] = place, max(distances.get(id(place), (place, 0.0))[1], distance)
        return own

    def within(self, limits: dict[str, float]) -> dict[str, tuple[Any, ...]]:
        return {
            kind: tuple(place for place, distance in distances.values() if distance <= limits[kind])
            for kind, distances in self._by_kind.items()
        }


class _NoKernel(Exception):
    """The kernel does not support these inputs."""


def find(model: Any, fixed: StaticDecodeState) -> Fused:
    """The operations that can be fused. Runs the step of a filled `fixed` once, eagerly, without advancing it."""
    distances = _Distances()
    with contextlib.ExitStack() as stack:
        for norm in _norms(model):
            stack.enter_context(replace_forward(norm, _measured_norm(norm, distances)))
        for space in _spaces(model, _ROTATION):
            stack.enter_context(_global(space, _ROTATION, _measured_rotation(space, distances)))
        for table in _tables(model):
            stack.enter_context(
                compat.attention_function(table, _ATTENTION, _measured_attention(table, fixed, distances))
            )
        fixed.forward()
    good = distances.within(LIMIT_32 if _exact(model) else LIMIT)
    return Fused(good["norm"], good["rotation"], good["attention"])


@contextlib.contextmanager
def applied(fused: Fused, fixed: StaticDecodeState) -> Iterator[None]:
    """A context in which a step of `fixed` runs the fused kernels."""
    with contextlib.ExitStack() as stack:
        for norm in fused.norms:
            stack.enter_context(replace_forward(norm, _norm(norm)))
        for space in fused.rotations:
            stack.enter_context(_global(space, _ROTATION, _rotation(getattr(space, _ROTATION))))
        for table in fused.attentions:
            stack.enter_context(
                compat.attention_function(table, _ATTENTION, _attention(table[_ATTENTION], fixed))
            )
        yield


# ---------------------------------------------------------------- finding and replacing functions


def _norms(model: Any) -> list[Any]:
    return [
        m
        for m in model.modules()
        if type(m).__name__.endswith(_NORM)
        and getattr(m, "weight", None) is not None
        and _epsilon(m) is not None
    ]


def _epsilon(norm: Any) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return getattr(norm, name)
    return None


def _spaces(model: Any, name: str) -> list[Any]:
    """The Python modules of the model's code that have an attribute of this name."""
    names = {
        type(m).__module__ for m in model.modules() if type(m).__module__.startswith("transformers.models.")
    }
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules[n], name)]


def _tables(model: Any) -> list[Any]:
    """transformers' tables of attention functions that the model uses."""
    if compat.attention(model) != _ATTENTION:
        return []
    name = "ALL_ATTENTION_FUNCTIONS"
    return list({id(t): t for t in (getattr(s, name) for s in _spaces(model, name))}.values())


def _exact(model: Any) -> bool:
    import torch

    return next(p.dtype for p in model.parameters() if p.is_floating_point()) == torch.float32


@contextlib.contextmanager
def _global(space: Any, name: str, function: Callable) -> Iterator[None]:
    before = getattr(space, name)
    setattr(space, name, function)
    try:
        yield
    finally:
        setattr(space, name, before)


# ---------------------------------------------------------------- comparing a kernel with the library's function


def _measured_norm(norm: Any, distances: _Distances) -> Callable:
    own = norm.forward

    def forward(x, *args, **kwargs):
        output = own(x, *args, **kwargs)
        return distances.measure("norm", norm, lambda: _norm(norm)(x), output)

    return forward


def _measured_rotation(space: Any, distances: _Distances) -> Callable:
    own = getattr(space, _ROTATION)

    def rotation(q, k, cos, sin, *args, **kwargs):
        output = own(q, k, cos, sin, *args, **kwargs)
        return distances.measure("rotation", space, lambda: _rotated(q, k, cos, sin, args, kwargs), output)

    return rotation


def _measured_attention(table: Any, fixed: StaticDecodeState, distances: _Distances) -> Callable:
    own = table[_ATTENTION]

    def attention(module, query, key, value, attention_mask, **kwargs):
        output = own(module, query, key, value, attention_mask, **kwargs)
        distances.measure(
            "attention", table, lambda: _attended(query, key, value, kwargs, fixed, _attend), output[0]
        )
        return output

    return attention


def _distance(one: Any, other: Any) -> float:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else ((one, other),)
    largest = 0.0
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        distance = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))
        largest = max(largest, distance if distance == distance else float("inf"))
    return largest


# ---------------------------------------------------------------- replacements in a step


def _norm(norm: Any) -> Callable:
    weight, epsilon = norm.weight, _epsilon(norm)

    def forward(x):
        if x.dtype != weight.dtype or weight.numel() != x.shape[-1]:
            raise _NoKernel
        return _rms_norm(x, weight, epsilon)

    return forward


def _rotation(own: Callable) -> Callable:
    def rotation(q, k, cos, sin, *args, **kwargs):
        try:
            return _rotated(q, k, cos, sin, args, kwargs)
        except _NoKernel:
            return own(q, k, cos, sin, *args, **kwargs)

    return rotation


def _rotated(q: Any, k: Any, cos: Any, sin: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    if (
        args
        or kwargs
        or q.dim() != 4
        or q.shape[2] != 1
        or k.shape[2] != 1
        or q.stride(-1) != 1
        or k.stride(-1) != 1
    ):
        raise _NoKernel
    if (
        cos.shape[-1] != q.shape[-1]
        or k.shape[-1] != q.shape[-1]
        or q.shape[-1] % 2
        or {cos.dtype, k.dtype} != {q.dtype}
    ):
        raise _NoKernel
    return _rotate(q, k, cos, sin)


def _attention(own: Callable, fixed: StaticDecodeState) -> Callable:
    operation = _operation()  # a custom operation, which torch.compile does not trace

    def attention(module, query, key, value, attention_mask, **kwargs):
        try:
            return _attended(query, key, value, kwargs, fixed, operation), None
        except _NoKernel:
            return own(module, query, key, value, attention_mask, **kwargs)

    return attention


def _attended(
    query: Any, key: Any, value: Any, kwargs: dict, fixed: StaticDecodeState, operation: Callable
) -> Any:
    size = query.shape[-1]
    if (
        query.shape[2] != 1
        or key.shape[2] != fixed.capacity
        or key.shape != value.shape
        or key.shape[-1] != size
    ):
        raise _NoKernel
    if size > 256 or query.shape[1] % key.shape[1] or query.stride(-1) != 1 or query.dtype != key.dtype:
        raise _NoKernel
    if any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache")):
        raise _NoKernel
    scaling = kwargs.get("scaling")
    scaling = size**-0.5 if scaling is None else float(scaling)
    return operation(query, key, value, fixed.position, scaling)


@cache
def _operation() -> Any:
    """Attention as one custom operation, which torch.compile does not trace."""
    import torch

    attend = torch.library.custom_op(
        "comparator::attend_one",
        lambda query, keys, values, position, scaling: _attend(query, keys, values, position, scaling),
        mutates_args=(),
        schema="(Tensor query, Tensor keys, Tensor values, Tensor position, float scaling) -> Tensor",
    )
    attend.register_fake(
        lambda query, *_: query.new_empty((query.shape[0], 1, query.shape[1], query.shape[3]))
    )
    return attend


def _on_gpu(tensor: Any) -> bool:
    return tensor.device.type == "cuda"


def _rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    if _on_gpu(x):
        from comparator.decoding.triton_fused import launch_rms_norm as kernel
    else:
        from comparator.decoding.reference_ops import rms_norm as kernel
    return kernel(x, weight, epsilon)


def _rotate(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    if _on_gpu(q):
        from comparator.decoding.triton_fused import launch_rotate as kernel
    else:
        from comparator.decoding.reference_ops import rotate as kernel
    return kernel(q, k, cos, sin)


def _attend(query: Any, keys: Any, values: Any, position: Any, scaling: float) -> Any:
    if _on_gpu(query):
        from comparator.decoding.triton_fused import launch_attend as kernel
    else:
        from comparator.decoding.reference_ops import attend as kernel
    return kernel(query, keys, values, position, scaling)
