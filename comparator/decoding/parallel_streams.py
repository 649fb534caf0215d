"""Matmuls of packed weights with the same input (q, k and v, or gate and up), each on a parallel stream.

A GEMV with packed weights is a short kernel that leaves much of a large GPU idle, and successive ones wait for each other's
start and end. In a captured graph those with the same input become branches that are joined after the last. The kernels
and values are the library's own, so results are bit-identical. Used only while a step is captured.

`find` observes one step to see which ones share an input, without a list of models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from comparator.backends import owner
from comparator.decoding.patching import replace_forward

if TYPE_CHECKING:
    from comparator.decoding.static_state import StaticDecodeState

Groups = tuple[tuple[Any, ...], ...]

STREAMS = 4  # the step's own included; q, k and v take three
NOTE = (
    "Matmuls with the same input (q, k and v, say) run on parallel streams in the captured CUDA graph: the library's "
    "own kernels on the same values."
)


def find(model: Any, fixed: StaticDecodeState) -> Groups:
    """Groups of modules with packed weights that are called once per step with the same tensor as their only argument,
    in the order of the calls. Runs the step of a filled `fixed` once, eagerly, without advancing it.

    Empty for a batch: libraries then unpack the weights, and one matmul occupies the whole card.
    """
    import torch

    watched = [m for m in model.modules() if (b := owner(m)) is not None and b.on_parallel_streams(m)]
    if fixed.batch > 1 or not watched:
        return ()
    calls: dict[int, int] = {}  # by id of the module
    # By id of the input: the tensor, a copy of its values at the first call, modules.
    groups: dict[int, tuple[Any, Any, list[Any]]] = {}

    def record_input(module: Any, args: tuple, kwargs: dict) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if kwargs or len(args) != 1:
            return
        if id(args[0]) not in groups:
            groups[id(args[0])] = args[0], args[0].clone(), []
        x, first, members = groups[id(args[0])]
        # The input must not have been written to between two of its readers.
        if x.shape == first.shape and torch.equal(x, first):
            members.append(module)

    hooks = [m.register_forward_pre_hook(record_input, with_kwargs=True) for m in watched]
    try:
        fixed.forward()
    finally:
        for hook in hooks:
            hook.remove()
    once = (tuple(m for m in members if calls[id(m)] == 1) for _, _, members in groups.values())
    return tuple(members for members in once if len(members) > 1)


@contextlib.contextmanager
def applied(groups: Groups, device: Any) -> Iterator[None]:
    """A context in which the first of a group to be called runs all of it. torch.compile does not trace them
    (`custom_ops`)."""
    streams = _streams(device) if groups else ()
    with contextlib.ExitStack() as stack:
        for members in groups:
            group = _Group(members, streams)
            for module in members:
                stack.enter_context(replace_forward(module, _forward(group, module)))
        yield


def _streams(device: Any) -> tuple[Any, ...]:
    """New streams for each capture: PyTorch hands out 32 in turn, so those of one capture are never the same one."""
    import torch

    if device.type != "cuda":
        return ()
    return tuple(torch.cuda.Stream(device) for _ in range(STREAMS - 1))


def _forward(group: _Group, module: Any) -> Callable:
    def forward(x, *args, **kwargs):
        if args or kwargs:
            return group.forwards[module](x, *args, **kwargs)
        return group.output(module, x)

    forward.comparator_opaque = True
    return forward


class _Group:
    """The matmuls of one group. Each output is requested once per step, in the order that a compiler has chosen."""

    def __init__(self, members: tuple[Any, ...], streams: tuple[Any, ...]):
        self.forwards = {m: m.forward for m in members}
        self._streams = streams
        self._outputs: dict[Any, Any] = {}
        self._input: tuple | None = None

    def output(self, module: Any, x: Any) -> Any:
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if module not in self._outputs or key != self._input:
            self._outputs, self._input = self._all(module, x), key
        return self._outputs.pop(module)

    def _all(self, first: Any, x: Any) -> dict[Any, Any]:
        """The outputs of all matmuls of `x`, `first` on the step's own stream."""
        others = [m for m in self.forwards if m is not first]
        if not self._streams:
            return {m: self.forwards[m](x) for m in (first, *others)}
        import torch

        # A tensor made on a stream is freed to that stream, and nothing starts there before the step's own stream
        # reaches the fork: all its readers have finished by then.
        step = torch.cuda.current_stream(x.device)
        fork = step.record_event()
        outputs = {}
        for number, module in enumerate(others):
            stream = self._streams[number % len(self._streams)]
            stream.wait_event(fork)
            with torch.cuda.stream(stream):
                outputs[module] = self.forwards[module](x)
        outputs[first] = self.forwards[first](x)
        for stream in self._streams[: len(others)]:
            step.wait_stream(stream)
        return outputs
