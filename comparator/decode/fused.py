"""What lies between a step's multiplications, fused: RMSNorm, the rotary embedding, and one token's attention.

transformers writes a norm as eight small kernels and a rotary embedding as ten, and attention over a padded cache reads
the padding too. While a step is recorded a norm takes three, a rotation one and attention two; what multiplies the
weights stays the library's own, and so do eager decoding and prefill.

Nothing is taken for granted: `find` runs one step on the library's own path with each kernel beside it, on the real
activations, and only what agrees to within a rounding is used. Knows token steps; nothing of variants or of graphs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from comparator import words
from comparator.decode.instead import instead

if TYPE_CHECKING:
    from comparator.decode.fixed import Fixed

# Up to this many slots the library's attention is taken: norms and rotations give eager's bits, attention in another
# order does not. Beyond, it would cost more than everything else that lies between the multiplications: it reads the
# padding, and works through the cache with one program a head.
EXACT_SLOTS = 1024
# ‖kernel − own‖ / ‖own‖ that rounding explains. A norm and a rotation are 0 where eager rounds as transformers' Llama
# does; attention rounds the softmax before the last product, as every fused kernel of it does.
LIMIT = {"norm": 0.002, "rotation": 0.002, "attention": 0.01}
LIMIT_32 = {"norm": 1e-5, "rotation": 1e-5, "attention": 1e-4}
WORDS = {"norm": "norms", "rotation": "the rotary embedding", "attention": "attention"}
_NORM = "RMSNorm"
_ROTATION = "apply_rotary_pos_emb"
_ATTENTION = "sdpa"


@dataclass(frozen=True)
class Fused:
    """What of a model may be fused. `norms`: modules; `rotations`: Python modules whose function is replaced."""

    norms: tuple[Any, ...] = ()
    rotations: tuple[Any, ...] = ()
    attentions: tuple[Any, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """For the column."""
        found = {"norm": self.norms, "rotation": self.rotations, "attention": self.attentions}
        names = [WORDS[kind] for kind, places in found.items() if places]
        if not names:
            return ()
        return (
            f"Between the multiplications, fused kernels of this project compute {words.join(names)}; what multiplies the "
            "weights is the library's own.",
        )

    def of(self, capacity: int, compiled: bool, exact: bool = True) -> Fused:
        """What a step takes. torch.compile fuses norms and rotations with their neighbours, and rounds anew anyway.
        `exact`: there are bits of eager decoding that a step could give (`repeats`)."""
        if compiled:
            return Fused(attentions=self.attentions)
        return self if capacity > EXACT_SLOTS or not exact else Fused(self.norms, self.rotations)


def repeats(model: Any) -> bool:
    """Whether eager decoding gives the same bits each time. ExLlamaV2 adds with atomic operations in fp16, in whatever
    order its blocks come: then there are no bits to keep."""
    return not any(type(m).__name__ == "ExllamaV2Linear" for m in model.modules())


class _Seen:
    """The largest distance of each candidate so far; infinite where the kernel does not apply."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, tuple[Any, float]]] = {kind: {} for kind in LIMIT}

    def note(self, kind: str, place: Any, kernel: Callable[[], Any], own: Any) -> Any:
        """Remember how far `kernel()` is from what the library gave; returns the latter. A kernel that fails, on a card
        that its compiler does not know, say, is not used: the column does without it."""
        try:
            apart = _distance(kernel(), own)
        except Exception:
            apart = float("inf")
        known = self._known[kind]
        known[id(place)] = place, max(known.get(id(place), (place, 0.0))[1], apart)
        return own

    def within(self, limits: dict[str, float]) -> dict[str, tuple[Any, ...]]:
        return {
            kind: tuple(place for place, apart in known.values() if apart <= limits[kind])
            for kind, known in self._known.items()
        }


class _NoKernel(Exception):
    """These inputs are none that a kernel takes."""


def find(model: Any, fixed: Fixed) -> Fused:
    """Run the step of a filled `fixed` once, eagerly, and see what can be fused. It moves nothing on."""
    seen = _Seen()
    with contextlib.ExitStack() as stack:
        for norm in _norms(model):
            stack.enter_context(instead(norm, _watched_norm(norm, seen)))
        for space in _spaces(model, _ROTATION):
            stack.enter_context(_global(space, _ROTATION, _watched_rotation(space, seen)))
        for table in _tables(model):
            stack.enter_context(_entry(table, _ATTENTION, _watched_attention(table, fixed, seen)))
        fixed.forward()
    good = seen.within(LIMIT_32 if _exact(model) else LIMIT)
    return Fused(good["norm"], good["rotation"], good["attention"])


@contextlib.contextmanager
def applied(fused: Fused, fixed: Fixed) -> Iterator[None]:
    """Inside, a step of `fixed` takes the kernels."""
    with contextlib.ExitStack() as stack:
        for norm in fused.norms:
            stack.enter_context(instead(norm, _norm(norm)))
        for space in fused.rotations:
            stack.enter_context(_global(space, _ROTATION, _rotation(getattr(space, _ROTATION))))
        for table in fused.attentions:
            stack.enter_context(_entry(table, _ATTENTION, _attention(table[_ATTENTION], fixed)))
        yield


# ---------------------------------------------------------------- where they go


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
    """The Python modules that the model's code lies in, as far as they have something of this name."""
    names = {
        type(m).__module__ for m in model.modules() if type(m).__module__.startswith("transformers.models.")
    }
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules[n], name)]


def _tables(model: Any) -> list[Any]:
    """transformers' tables of attention functions that the model looks into."""
    if model.config._attn_implementation != _ATTENTION:
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


@contextlib.contextmanager
def _entry(table: Any, name: str, function: Callable) -> Iterator[None]:
    """transformers lets one table override an entry for itself; what it held before comes back."""
    before = table._local_mapping.get(name)
    table[name] = function
    try:
        yield
    finally:
        if before is None:
            del table[name]
        else:
            table[name] = before


# ---------------------------------------------------------------- the library's own and the kernel, side by side


def _watched_norm(norm: Any, seen: _Seen) -> Callable:
    own = norm.forward

    def forward(x, *args, **kwargs):
        given = own(x, *args, **kwargs)
        return seen.note("norm", norm, lambda: _norm(norm)(x), given)

    return forward


def _watched_rotation(space: Any, seen: _Seen) -> Callable:
    own = getattr(space, _ROTATION)

    def rotation(q, k, cos, sin, *args, **kwargs):
        given = own(q, k, cos, sin, *args, **kwargs)
        return seen.note("rotation", space, lambda: _rotated(q, k, cos, sin, args, kwargs), given)

    return rotation


def _watched_attention(table: Any, fixed: Fixed, seen: _Seen) -> Callable:
    own = table[_ATTENTION]

    def attention(module, query, key, value, attention_mask, **kwargs):
        given = own(module, query, key, value, attention_mask, **kwargs)
        seen.note("attention", table, lambda: _attended(query, key, value, kwargs, fixed, _attend), given[0])
        return given

    return attention


def _distance(one: Any, other: Any) -> float:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else ((one, other),)
    furthest = 0.0
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        apart = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))
        furthest = max(furthest, apart if apart == apart else float("inf"))
    return furthest


# ---------------------------------------------------------------- what a step runs


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


def _attention(own: Callable, fixed: Fixed) -> Callable:
    operation = _operation()  # a compiler is handed the operation itself

    def attention(module, query, key, value, attention_mask, **kwargs):
        try:
            return _attended(query, key, value, kwargs, fixed, operation), None
        except _NoKernel:
            return own(module, query, key, value, attention_mask, **kwargs)

    return attention


def _attended(query: Any, key: Any, value: Any, kwargs: dict, fixed: Fixed, operation: Callable) -> Any:
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
    """Attention as one operation that torch.compile does not look into."""
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
        from comparator.decode.fused_kernels import launch_rms_norm as kernel
    else:
        from comparator.decode.fused_plain import rms_norm as kernel
    return kernel(x, weight, epsilon)


def _rotate(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    if _on_gpu(q):
        from comparator.decode.fused_kernels import launch_rotate as kernel
    else:
        from comparator.decode.fused_plain import rotate as kernel
    return kernel(q, k, cos, sin)


def _attend(query: Any, keys: Any, values: Any, position: Any, scaling: float) -> Any:
    if _on_gpu(query):
        from comparator.decode.fused_kernels import launch_attend as kernel
    else:
        from comparator.decode.fused_plain import attend as kernel
    return kernel(query, keys, values, position, scaling)
