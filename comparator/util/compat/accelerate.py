"""The hooks with which accelerate moves a weight to the GPU at each use; written for accelerate 1.15."""

from __future__ import annotations

from typing import Any

WRITTEN_FOR = "1.15"


def real(module: Any, name: str, tensor: Any) -> Any:
    """The tensor itself: `tensor`, or the offloaded one if it is accelerate's placeholder."""
    if tensor.device.type != "meta":
        return tensor
    for hook in _hooks(module):
        try:
            return hook.weights_map[name]
        except (KeyError, TypeError, AttributeError):
            continue
    return tensor


def offloaded(module: Any) -> list[Any]:
    """The tensors of a module that accelerate keeps on the CPU."""
    if not _hooks(module):
        return []
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    tensors = [real(module, name, t) for name, t in own if t.device.type == "meta"]
    return [t for t in tensors if t.device.type != "meta"]


def _hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
