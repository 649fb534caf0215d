"""Compares a captured decode step with the eager one: does rounding, measured on the model itself, explain the difference?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comparator.decoding.cuda_graph import CapturedStep
    from comparator.decoding.static_state import StaticDecodeState

CHECK_TOKENS = 8
# Maximum ‖difference‖ / ‖own output‖ of a layer that a backend replaces for the capture (LLM.int8 with outliers), on the
# real activations.
LAYER_TOLERANCE = 0.01
# ‖difference‖ / ‖eager‖ of the logits that is always accepted. The captured step sums attention in another order, which
# in 16 bits changes them by up to about 1 %.
TOLERANCE = {"float32": 0.01, "default": 0.02}
# A larger distance is accepted up to ROUNDINGS × the effect of one rounding of each layer's output on this model, which
# LLM.int8 (activations are rounded to 8 bits repeatedly) and random weights amplify. A step rounds in about ten places
# per layer, and independent errors add up as √10. A step that dropped work is off by 50 % and more on any model, so MOST
# is the maximum.
ROUNDINGS, MOST = 3.0, 0.4


@dataclass(frozen=True)
class Check:
    """Result of decoding the same prompt greedily on both paths. `limit`: the `distance` that rounding explains."""

    tokens: int
    first_difference: int | None
    distance: float  # the largest ‖difference‖ / ‖eager‖ of the logits up to the first different token
    limit: float
    layers: float | None = None  # the same per layer, for the layers of `capture_forward` alone
    rounding: float | None = None  # `one_rounding`, where it was measured
    gap: float | None = None  # eager logit of its own token − of the other path's token
    scale: float | None = None  # the eager logit of its own token

    @property
    def wrong(self) -> str | None:
        """A sentence on a difference larger than rounding explains, or None."""
        return too_far(self.distance, self.limit, self.layers)

    def in_words(self) -> str:
        if self.first_difference is None:
            return f"{self.tokens} tokens equal, logits within {self.distance:.1%}"
        measured = (
            f"; one rounding of each layer's output moves this model's by {self.rounding:.2%}"
            if self.rounding is not None
            else ""
        )
        return (
            f"token {self.first_difference + 1} differs: the eager logits prefer theirs by {self.gap:.4g} at a size "
            f"of {self.scale:.4g}, and the two paths' logits are {self.distance:.2%} apart, which is rounding (fused "
            f"operations are summed in another order{measured})"
        )


def too_far(distance: float, limit: float, layers: float | None) -> str | None:
    """A sentence where a step is further from the eager one than rounding explains, or None; arguments as in `Check`."""
    if layers is not None and layers > LAYER_TOLERANCE:
        return f"a layer rewritten for CUDA graphs differs from the library's own by {layers:.1%}"
    if not distance <= limit:
        return (
            f"the captured graph's logits are {distance:.0%} from the eager ones, more than the {limit:.0%} that "
            "rounding explains"
        )
    return None


def tolerance(model: Any) -> float:
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    return TOLERANCE.get(dtype, TOLERANCE["default"])


def compare(model: Any, recorded: CapturedStep, prompt_ids: list[int], tokens: int = CHECK_TOKENS) -> Check:
    """Decode greedily on both paths and compare logits and tokens up to the first difference."""
    import torch

    from comparator.decoding import capture_forward
    from comparator.decoding.generate import Stepper, decoding

    fixed, distance = recorded.fixed, 0.0
    free_slots = fixed.capacity - len(prompt_ids)
    difference = gap = scale = None
    with torch.inference_mode(), decoding(model) as begin_decoding:
        eager = Stepper(model, prompt_ids, tokens + 1)
        first = eager.next_logits()
        token = int(first.argmax(-1))
        begin_decoding()
        fixed.fill(eager.cache, eager.length, token, first.shape[-1])
        layers = None
        for step in range(1, min(tokens, free_slots)):
            eager.push(token)
            if step == 1:
                expected, layers = capture_forward.largest_difference(model, eager.next_logits)
                expected = expected[0]
            else:
                expected = eager.next_logits()[0]
            recorded.replay()
            logits = fixed.logits[0]
            if not bool(torch.isfinite(expected).all()):
                break  # this variant overflows eagerly too; the run itself will say so
            relative = float((logits - expected).norm() / expected.norm().clamp_min(1e-9))
            distance = max(distance, relative if relative == relative else float("inf"))
            token, other = int(expected.argmax()), int(logits.argmax())
            fixed.token.fill_(token)
            if token != other:
                difference, gap, scale = (
                    step,
                    float(expected[token] - expected[other]),
                    float(expected[token]),
                )
                break
        limit, rounding = explained(model, fixed, distance)
    compared = min(tokens, free_slots) if difference is None else difference
    return Check(compared, difference, distance, limit, layers, rounding, gap, scale)


def explained(model: Any, fixed: StaticDecodeState, distance: float) -> tuple[float, float | None]:
    """(the distance that rounding explains, `one_rounding` if it was needed)."""
    limit = tolerance(model)
    if distance <= limit:
        return limit, None
    rounding = one_rounding(model, fixed)
    return max(limit, min(MOST, ROUNDINGS * rounding)), rounding


def one_rounding(model: Any, fixed: StaticDecodeState, seed: int = 0) -> float:
    """‖difference‖ / ‖own‖ of a step's logits when each layer's output changes by up to half the distance between
    neighbouring values of its dtype, as another order of evaluation may do. Runs the step twice, eagerly, without
    advancing the state."""
    import torch

    from comparator.decoding.introspect import decoder_layers

    def moved(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        noise = (
            torch.rand(hidden.shape, generator=generator, device=hidden.device, dtype=torch.float32) * 2 - 1
        )
        other = (hidden.float() * (1 + noise * (torch.finfo(hidden.dtype).eps / 2))).to(hidden.dtype)
        return (other, *output[1:]) if isinstance(output, tuple) else other

    position = int(fixed.position)
    fixed.position.fill_(min(position, fixed.capacity - 1))
    own = fixed.forward().float()
    generator = torch.Generator(fixed.device).manual_seed(seed)
    handles = [layer.register_forward_hook(moved) for layer in decoder_layers(model)]
    try:
        other = fixed.forward().float()
    finally:
        for handle in handles:
            handle.remove()
        fixed.position.fill_(position)
    return float((other - own).norm() / own.norm().clamp_min(1e-9))
