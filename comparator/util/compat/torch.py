"""Private parts of PyTorch; written for torch 2.13."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

WRITTEN_FOR = "2.13"


def clear_cublas_workspaces() -> None:
    """Free cuBLAS's workspaces: 32 MiB a stream on Hopper. Those of captured graphs are in the graphs' own pools."""
    import torch

    if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):  # a build without CUDA has none
        clear()


def wrapped_tensors(tensor: Any) -> list[Any] | None:
    """The tensors that a tensor subclass wraps (torchao's quantized ones); None for a tensor with values of its own."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return None
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def plain_tensors(tensor: Any) -> list[Any]:
    """The tensors in which the values of `tensor` lie: itself, or those that a tensor subclass wraps."""
    wrapped = wrapped_tensors(tensor)
    return [tensor] if wrapped is None else [plain for inner in wrapped for plain in plain_tensors(inner)]


def rewrap(tensor: Any, change: Callable[[Any], Any]) -> None:
    """Put `change` of each tensor that a tensor subclass wraps in its place."""
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if wrapped_tensors(inner) is not None:
            rewrap(inner, change)
        else:
            setattr(tensor, name, change(inner))


def persistent_buffers(module: Any) -> list[tuple[str, Any]]:
    """(name, buffer) of a module's own buffers that are saved."""
    skipped = module._non_persistent_buffers_set
    return [
        (name, buffer)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        if name not in skipped
    ]


def version(tensor: Any) -> int:
    """Counts the writes into a tensor; 0 for an inference tensor, which has no count."""
    return 0 if tensor.is_inference() else tensor._version


def int4_matmul(x: Any, packed: Any, group_size: int, scales_and_zeros: Any) -> Any:
    """PyTorch's 4-bit kernel: x (rows, inputs) bf16 → (rows, outputs) bf16."""
    import torch

    if x.is_cuda:
        return torch._weight_int4pack_mm(x, packed, group_size, scales_and_zeros)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)


def int4_inner_tiles(inputs: int) -> int:
    """Inner tiles of 16 inputs that `int4_matmul` takes at once on CUDA; 0 where none divides."""
    return next((tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0), 0)


def int4_pack(codes: Any) -> Any:
    """The layout that `int4_matmul` takes on the device of `codes` (outputs, inputs), uint8 from 0 to 15."""
    import torch

    if codes.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        return torch._convert_weight_to_int4pack(pairs, int4_inner_tiles(codes.shape[1]))
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def int4_unpack(packed: Any, inputs: int, group_size: int, scales_and_zeros: Any) -> Any:
    """The weight (outputs, inputs) bf16 that `int4_matmul` multiplies by: its layouts cannot be read back, so it multiplies
    the identity."""
    import torch

    identity = torch.eye(inputs, dtype=torch.bfloat16, device=packed.device)
    return int4_matmul(identity, packed, group_size, scales_and_zeros).t().contiguous()


def int8_matmul(a: Any, b: Any) -> Any:
    """The product of int8 matrices as int32. On CUDA `a` has more than 16 rows, and sizes are multiples of 8."""
    import torch

    return torch._int_mm(a, b)


@contextlib.contextmanager
def compiler_options(**inductor: Any) -> Iterator[None]:
    """Inside, torch.compile uses these options of inductor, and keeps enough versions of one function for the layers of a
    model, which share their code."""
    import torch._dynamo
    from torch._inductor import config

    with (
        torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096),
        config.patch(inductor),
    ):
        yield


@contextlib.contextmanager
def persistent_reductions(wanted: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, inductor also writes those reductions in one pass for which `wanted(SIMDKernelFeatures)` is true. Another
    release, which is asked in another way, decides by itself."""
    try:
        from torch._inductor.choices import InductorChoices
        from torch._inductor.virtualized import V

        method = vars(InductorChoices)["should_use_persistent_reduction"]
        own, handler = InductorChoices.should_use_persistent_reduction, V.set_choices_handler
    except (ImportError, AttributeError, KeyError):
        method = None
    if not isinstance(method, staticmethod):
        yield
        return

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            return wanted(features) or own(features, cooperative_reduction)

    with handler(Choices()):
        yield
