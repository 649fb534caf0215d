"""gptqmodel's kernels for GPTQ. The limits are gptqmodel 7.6's own (SUPPORTS_* of its linear classes)."""

from __future__ import annotations

from comparator.backends.gptqmodel_layers.kernels import Kernel, Kernels, for_torch_aten

_ANY_GROUP = (-1, 16, 32, 64, 128, 256, 512, 1024)
# Fastest first, per device; measured figures are in docs/benchmarks.md. Left out on the CPU: torch_fused, which
# ignores zero points there, and torch_int8, which rounds the weights once more and so is another variant.
KERNELS = Kernels("GPTQ", (
    Kernel("marlin", "gptq_marlin", "MarlinLinear", "cuda", (4, 8), (-1, 32, 64, 128), "needs compiling (minutes)",
           symmetric_only=True, extension="marlin_{dtype}", compiles="some minutes", capability=(7, 5)),
    Kernel("exllama_v2", "gptq_exllama_v2", "ExllamaV2Linear", "cuda", (4,), (-1, 32, 64, 128), "needs compiling (about 40 s)",
           divides=(32, 32), extension="exllamav2", compiles="about 40 s", whole=True),
    Kernel("triton", "gptq_triton", "TritonV2Linear", "cuda", (2, 4, 8), _ANY_GROUP, "starts at once", divides=(32, 32),
           trainable=True),
    Kernel("machete", "gptq_machete", "MacheteLinear", "cuda", (4, 8), (-1, 64, 128), "Hopper; downloads CUTLASS and compiles",
           divides=(64, 128), extension="machete", compiles="many minutes, after a download", capability=(9, 0),
           automatic=False),
    Kernel("torch_aten", "gptq_torch_aten", "TorchAtenLinear", "cpu", (4,), (16, 32, 64, 128),
           "PyTorch's own 4-bit kernel; multiplies in bf16", repack=for_torch_aten),
    Kernel("torch", "gptq_torch", "TorchLinear", "any", (2, 3, 4, 8), _ANY_GROUP, "unpacks to 16 bits and multiplies; slow",
           trainable=True),
))  # fmt: skip
