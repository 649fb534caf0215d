"""The weights of a torch model, module by module, and layers of one model in the place of another's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from comparator.backends.base import Backend
from comparator.runtimes.base import Weights


class ModelWeights(Weights):
    """Unpacked by the backend that packed them."""

    def __init__(self, model: Any, backend: Backend):
        self.backend, self.weight_name = backend, backend.weight_name
        self._modules = {_plain(name): module for name, module in model.named_modules()}

    def modules(self) -> Sequence[str]:
        return [name for name in self._modules if self.tensors(name)]

    def tensors(self, module: str) -> Mapping[str, Any]:
        """Parameters, and the packed weight where that is a buffer."""
        if (found := self._modules.get(module)) is None:
            return {}
        tensors = dict(found.named_parameters(recurse=False, remove_duplicate=False))
        packed = dict(found.named_buffers(recurse=False)).get(self.weight_name)
        return tensors if packed is None else {**tensors, self.weight_name: packed}

    def unpacked(self, module: str) -> Any | None:
        return self.backend.dequantize(self._modules[module]) if module in self._modules else None


def _plain(name: str) -> str:
    """A module's name without what an adapter's wrapping puts into it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(p for p in parts if p != "base_layer")


def replaceable(donor: Any, backend: Any, model: Any) -> list[str]:
    """Names of the layers that the variant keeps in another way than the reference: the quantized ones, or every
    linear layer of a variant that is not quantized."""
    import torch

    names = dict(model.named_modules())
    shared = [(name, module) for name, module in donor.named_modules() if name in names]
    quantized = [name for name, module in shared if backend.quant_state(module)]
    return quantized or [name for name, module in shared if isinstance(module, torch.nn.Linear)]


@contextlib.contextmanager
def swapped(model: Any, donor: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, the named layers of `model` are the donor's. Whatever happens, its own are back afterwards."""
    originals = {name: model.get_submodule(name) for name in names}
    kind = next((p.dtype for p in donor.parameters() if p.is_floating_point()), None)
    try:
        for name in names:
            model.set_submodule(name, _casting(donor.get_submodule(name), kind))
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def _casting(inner: Any, dtype: Any) -> Any:
    """The layer, fed in its own model's dtype; its output goes on in the dtype of the model it was put into."""
    import torch

    class Cast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, *rest, **named):
            return self.inner(x if dtype is None else x.to(dtype), *rest, **named).to(x.dtype)

    return Cast()
