"""Products of packed weights that read one input, abreast: q, k and v, or gate and up, each on a stream of its own.

A kernel that multiplies one row by packed weights is short: it leaves much of a large GPU idle, and one after another such
kernels wait for each other's beginning and end. In a recorded step those that read the same tensor become branches of the
graph, joined after the last. It is the library's own code on the same values, so the results are the same bits; only their
order in time changes. Used while a step is recorded and nowhere else.

Which ones read the same tensor is not taken from a list of models: `find` watches one step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from comparator.decode.instead import instead

if TYPE_CHECKING:
    from comparator.decode.fixed import Fixed

Groups = tuple[tuple[Any, ...], ...]

STREAMS = 4  # at once, the step's own included; q, k and v take three
NOTE = (
    "Products that read the same input (q, k and v, say) run side by side on the GPU in the recorded step: the library's "
    "own kernels on the same values."
)


def find(model: Any, fixed: Fixed) -> Groups:
    """Run the step of a filled `fixed` once, eagerly: the modules with packed weights that are called once each, with
    nothing but one and the same tensor, in the order of the calls. It moves nothing on.

    None for several sequences at once: libraries then unpack the weights and multiply them on the whole card.
    """
    import torch

    watched = [m for m in model.modules() if is_packed(m)]
    if fixed.batch > 1 or not watched:
        return ()
    calls: dict[int, int] = {}  # by id of the module
    # By id of the input: it, its values when first seen, modules.
    groups: dict[int, tuple[Any, Any, list[Any]]] = {}

    def see(module: Any, args: tuple, kwargs: dict) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if kwargs or len(args) != 1:
            return
        if id(args[0]) not in groups:
            groups[id(args[0])] = args[0], args[0].clone(), []
        given, first, members = groups[id(args[0])]
        # Nobody may have written into the input between two of its readers.
        if given.shape == first.shape and torch.equal(given, first):
            members.append(module)

    hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in watched]
    try:
        fixed.forward()
    finally:
        for hook in hooks:
            hook.remove()
    once = (tuple(m for m in members if calls[id(m)] == 1) for _, _, members in groups.values())
    return tuple(members for members in once if len(members) > 1)


def is_packed(module: Any) -> bool:
    """Whether a kernel of a library reads its packed weights. gptqmodel's torch kernel unpacks them and multiplies with
    cuBLAS, which would take a workspace for each stream and fills the card by itself."""
    library = type(module).__module__
    if library.startswith("gptqmodel"):
        return hasattr(module, "qweight") and not type(module).__name__.startswith("Torch")
    # peft's wrapper around one has the same class name and another library's.
    return library.startswith("bitsandbytes") and type(module).__name__ in ("Linear4bit", "Linear8bitLt")


@contextlib.contextmanager
def applied(groups: Groups, device: Any) -> Iterator[None]:
    """Inside, the first of a group to be called runs them all. A compiler does not look into them (`opaque.py`)."""
    streams = _streams(device) if groups else ()
    with contextlib.ExitStack() as stack:
        for members in groups:
            together = _Together(members, streams)
            for module in members:
                stack.enter_context(instead(module, _forward(together, module)))
        yield


def _streams(device: Any) -> tuple[Any, ...]:
    """Made anew for each recording: PyTorch hands out 32 of them in turn, so neighbours are never the same one."""
    import torch

    if device.type != "cuda":
        return ()
    return tuple(torch.cuda.Stream(device) for _ in range(STREAMS - 1))


def _forward(together: _Together, module: Any) -> Callable:
    def forward(x, *args, **kwargs):
        if args or kwargs:
            return together.own[module](x, *args, **kwargs)
        return together.output(module, x)

    forward.comparator_opaque = True
    return forward


class _Together:
    """The products of one group. Each is asked for its output once a step, in whatever order a compiler left them."""

    def __init__(self, members: tuple[Any, ...], streams: tuple[Any, ...]):
        self.own = {m: m.forward for m in members}
        self._streams = streams
        self._ready: dict[Any, Any] = {}
        self._input: tuple | None = None

    def output(self, module: Any, x: Any) -> Any:
        asked = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if module not in self._ready or asked != self._input:
            self._ready, self._input = self._all(module, x), asked
        return self._ready.pop(module)

    def _all(self, first: Any, x: Any) -> dict[Any, Any]:
        """Every product of `x`, `first` on the step's own stream."""
        others = [m for m in self.own if m is not first]
        if not self._streams:
            return {m: self.own[m](x) for m in (first, *others)}
        import torch

        # A tensor made on a stream is freed to that stream, and nothing starts there before the step's own stream has
        # come to the fork: whoever read the tensor is through by then.
        step = torch.cuda.current_stream(x.device)
        fork = step.record_event()
        outputs = {}
        for number, module in enumerate(others):
            stream = self._streams[number % len(self._streams)]
            stream.wait_event(fork)
            with torch.cuda.stream(stream):
                outputs[module] = self.own[module](x)
        outputs[first] = self.own[first](x)
        for stream in self._streams[: len(others)]:
            step.wait_stream(stream)
        return outputs
