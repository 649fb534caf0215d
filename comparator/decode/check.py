"""A recorded step beside the eager one: whether rounding explains how far apart they are, measured on the model itself.

Knows steps and logits; nothing of how a step is recorded or kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comparator.decode.fixed import Fixed
    from comparator.decode.graph import Recorded

CHECK_TOKENS = 8
# LLM.int8 with outliers runs in a form of our own; each layer of it is held against bitsandbytes' own, on the real
# activations.
LAYER_TOLERANCE = 0.01
# How far a step's logits may be from the eager ones, as ‖difference‖ / ‖eager‖, without a question. The recorded step
# sums attention in another order, which in 16 bits costs up to about 1 %.
TOLERANCE = {"float32": 0.01, "default": 0.02}
# What is further off has to be explained: by what one rounding of each layer's output does to this very model, which
# LLM.int8 (activations rounded to 8 bits again and again) and random weights multiply up. A step rounds anew in some
# ten places a layer, and independent errors add up as √10. A step that dropped work is off by 50 % and more, whatever
# the model.
ROUNDINGS, MOST = 3.0, 0.4


@dataclass(frozen=True)
class Check:
    """A recorded step beside the eager one, same prompt, greedy. `limit`: the `distance` that rounding explains."""

    tokens: int
    first_difference: int | None
    distance: float  # the largest ‖difference‖ / ‖eager‖ of the logits up to the first difference
    limit: float
    layers: float | None = None  # the same per layer, for LLM.int8's one-row form alone
    rounding: float | None = (
        None  # what a rounding of each layer's output does to the logits, where it was asked
    )
    gap: float | None = None  # eager logit of its own choice − of the other path's choice
    scale: float | None = None  # the eager logit of its own choice

    @property
    def wrong(self) -> str | None:
        """What is further off than rounding explains, or None."""
        if self.layers is not None and self.layers > LAYER_TOLERANCE:
            return f"a layer of LLM.int8's one-row form is {self.layers:.1%} from bitsandbytes' own"
        if not self.distance <= self.limit:
            return (
                f"the recorded step's logits are {self.distance:.0%} from the eager ones, more than the "
                f"{self.limit:.0%} that rounding explains"
            )
        return None

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


def tolerance(model: Any) -> float:
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    return TOLERANCE.get(dtype, TOLERANCE["default"])


def compare(model: Any, recorded: Recorded, prompt_ids: list[int], tokens: int = CHECK_TOKENS) -> Check:
    """Decode greedily on both paths and compare logits and tokens up to the first difference."""
    import torch

    from comparator.decode import int8
    from comparator.generate import Stepper, decoding

    fixed, distance = recorded.fixed, 0.0
    room = fixed.capacity - len(prompt_ids)
    difference = gap = scale = None
    with torch.inference_mode(), decoding(model) as begin_decoding:
        eager = Stepper(model, prompt_ids, tokens + 1)
        first = eager.next_logits()
        token = int(first.argmax(-1))
        begin_decoding()
        fixed.fill(eager.cache, eager.length, token, first.shape[-1])
        layers = None
        for step in range(1, min(tokens, room)):
            eager.push(token)
            if step == 1:
                expected, layers = int8.furthest(model, eager.next_logits)
                expected = expected[0]
            else:
                expected = eager.next_logits()[0]
            recorded.replay()
            got = fixed.logits[0]
            if not bool(torch.isfinite(expected).all()):
                break  # this variant overflows eagerly too; the run itself will say so
            apart = float((got - expected).norm() / expected.norm().clamp_min(1e-9))
            distance = max(distance, apart if apart == apart else float("inf"))
            token, other = int(expected.argmax()), int(got.argmax())
            fixed.token.fill_(token)
            if token != other:
                difference, gap, scale = (
                    step,
                    float(expected[token] - expected[other]),
                    float(expected[token]),
                )
                break
        limit, rounding = explained(model, fixed, distance)
    compared = min(tokens, room) if difference is None else difference
    return Check(compared, difference, distance, limit, layers, rounding, gap, scale)


def explained(model: Any, fixed: Fixed, distance: float) -> tuple[float, float | None]:
    """(the distance that rounding explains, what one rounding does to this model where that had to be asked)."""
    limit = tolerance(model)
    if distance <= limit:
        return limit, None
    rounding = one_rounding(model, fixed)
    return max(limit, min(MOST, ROUNDINGS * rounding)), rounding


def one_rounding(model: Any, fixed: Fixed, seed: int = 0) -> float:
    """‖difference‖ / ‖own‖ of a step's logits when each layer's output is moved by up to half the distance between
    neighbouring values of its dtype: what an evaluation in another order may do. Runs the step twice, eagerly, and moves
    nothing on."""
    import torch

    from comparator.generate import decoder_layers

    def moved(_: Any, __: Any, output: Any) -> Any:
        given = output[0] if isinstance(output, tuple) else output
        noise = torch.rand(given.shape, generator=generator, device=given.device, dtype=torch.float32) * 2 - 1
        other = (given.float() * (1 + noise * (torch.finfo(given.dtype).eps / 2))).to(given.dtype)
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
