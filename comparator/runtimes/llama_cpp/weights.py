"""The weights of a GGUF file, unpacked by the gguf library one at a time, for weight errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparator.backends.gguf import write
from comparator.runtimes.base import Weights
from comparator.sources import Checkpoint
from comparator.sources.gguf_header import GgufHeader, GgufTensor

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class FileWeights(Weights):
    def __init__(self, file: Path, header: GgufHeader, names: Mapping[str, str], checkpoint: Checkpoint):
        """`names`: GGUF's name of a tensor → the checkpoint's."""
        self.file, self.turned = file, write.TURNED[header.architecture]
        self._heads = {
            "q_proj": header.of_model("attention.head_count"),
            "k_proj": header.of_model("attention.head_count_kv") or header.of_model("attention.head_count"),
        }
        self._modules: dict[str, dict[str, GgufTensor]] = {}
        for tensor in header.tensors:
            module, _, name = names.get(tensor.name, tensor.name).rpartition(".")
            self._modules.setdefault(module, {})[name] = tensor
        if checkpoint.tied and "output.weight" not in header.types and "token_embd.weight" in names:
            self._modules["lm_head"] = self._modules[names["token_embd.weight"].rpartition(".")[0]]

    def modules(self) -> Sequence[str]:
        return list(self._modules)

    def tensors(self, module: str) -> Mapping[str, Any]:
        return {name: self._stored(tensor, module) for name, tensor in self._modules.get(module, {}).items()}

    def unpacked(self, module: str) -> Any | None:
        import gguf
        import torch

        tensor = self._modules.get(module, {}).get("weight")
        if tensor is None or tensor.type in _FLOATS:
            return None
        kind = getattr(gguf.GGMLQuantizationType, tensor.type)
        values = gguf.quants.dequantize(self._bytes(tensor), kind).reshape(tensor.shape)
        return torch.from_numpy(self._in_order(values, module))

    def _stored(self, tensor: GgufTensor, module: str) -> Any:
        import torch

        stored = torch.from_numpy(self._bytes(tensor))
        if tensor.type not in _FLOATS:
            return stored
        values = stored.view(getattr(torch, _FLOATS[tensor.type])).reshape(tensor.shape)
        return self._in_order(values, module)

    def _bytes(self, tensor: GgufTensor) -> Any:
        """(rows, bytes per row), copied out of the file."""
        import numpy as np

        stored = np.fromfile(self.file, np.uint8, tensor.bytes, offset=tensor.offset)
        return stored.reshape(math.prod(tensor.shape[:-1]), -1)

    def _in_order(self, values: Any, module: str) -> Any:
        """Queries and keys with rotary pairs as the checkpoint has them; an array or a tensor."""
        heads = self._heads.get(module.rpartition(".")[2]) if self.turned else None
        if not heads:
            return values
        shape = (heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
