"""Replaces layers whose own forward cannot be captured in a CUDA graph by the form of `Backend.capture_forward`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from comparator.backends import owner
from comparator.decoding.patching import replace_forward


def replaced_layers(model: Any, rows: int = 1) -> list[tuple[Any, Callable[[Any], Any], str]]:
    """(module, its forward for a capture, the backend's note) of each such layer."""
    layers = []
    for module in model.modules():
        backend = owner(module)
        if backend is not None and (forward := backend.capture_forward(module, rows)) is not None:
            layers.append((module, forward, backend.capture_note(module)))
    return layers


@contextlib.contextmanager
def capturable(model: Any, rows: int = 1) -> Iterator[tuple[str, ...]]:
    """A context in which these layers run the form for a capture of a step of `rows` sequences. Yields notes for the column."""
    layers = replaced_layers(model, rows)
    with contextlib.ExitStack() as stack:
        for module, forward, _ in layers:
            stack.enter_context(replace_forward(module, _opaque(forward)))
        yield tuple(dict.fromkeys(note for _, _, note in layers if note))


def largest_difference(model: Any, step: Callable[[], Any], rows: int = 1) -> tuple[Any, float | None]:
    """Run `step`, a decode step of `rows` sequences on the layers' own forwards, and compare both forms of each layer on the same input.

    Returns (the result of `step`, the largest ‖difference‖ / ‖own output‖, None for a model without such layers). The
    model's logits are not compared, since one activation that rounds differently changes all that follow.
    """
    differences: list[float] = []

    def compare(forward: Callable[[Any], Any]) -> Callable:
        def hook(_: Any, inputs: tuple, output: Any) -> None:
            other = forward(inputs[0]).float()
            differences.append(float((other - output.float()).norm() / output.float().norm().clamp_min(1e-9)))

        return hook

    layers = replaced_layers(model, rows)
    hooks = [module.register_forward_hook(compare(forward)) for module, forward, _ in layers]
    try:
        result = step()
    finally:
        for hook in hooks:
            hook.remove()
    return result, max(differences) if differences else None


def _opaque(own: Callable[[Any], Any]) -> Callable:
    def forward(x, *_, **__):
        return own(x)

    forward.comparator_opaque = True  # not traced by torch.compile: `custom_ops`
    return forward
