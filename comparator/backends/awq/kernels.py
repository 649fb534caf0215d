"""gptqmodel's kernels for AWQ, by the names that transformers' AwqConfig takes. The limits are gptqmodel 7.6's own."""

from __future__ import annotations

from comparator.backends.gptqmodel_layers.kernels import Kernel, Kernels, for_torch_aten

_GROUPS = (-1, 16, 32, 64, 128)
# Fastest first, per device. Left out: machete, which downloads CUTLASS; torch_fused_awq, and the int8 kernel, which rounds the weights once more and so is another variant.
KERNELS = Kernels("AWQ", (
    Kernel("marlin", "marlin", "AwqMarlinLinear", "cuda", (4, 8), (-1, 32, 64, 128), "needs compiling (minutes)",
           extension="marlin_{dtype}", compiles="some minutes", capability=(7, 5), dtypes=("fp16",)),
    Kernel("exllama_v2", "exllama_v2", "AwqExllamaV2Linear", "cuda", (4,), (-1, 32, 64, 128), "needs compiling (about 40 s)",
           divides=(32, 32), extension="exllamav2_awq", compiles="about 40 s", whole=True, dtypes=("fp16",)),
    Kernel("gemm", "gemm", "AwqGEMMLinear", "cuda", (4,), _GROUPS, "AutoAWQ's own kernel; needs compiling (minutes)",
           extension="awq", compiles="some minutes", capability=(7, 5), dtypes=("fp16",), trainable=True),
    Kernel("triton", "gemm_triton", "AwqGEMMTritonLinear", "cuda", (4,), (-1, 32, 64, 128), "starts at once",
           divides=(32, 8), dtypes=("fp16",), trainable=True),
    # transformers has no name for it; on a CPU "auto" is this kernel wherever it can run.
    Kernel("torch_aten", "auto", "TorchAtenAwqLinear", "cpu", (4,), (16, 32, 64, 128),
           "PyTorch's own 4-bit kernel; multiplies in bf16", repack=for_torch_aten),
    Kernel("torch", "torch_awq", "AwqTorchLinear", "any", (2, 3, 4, 8), _GROUPS, "unpacks to 16 bits and multiplies; slow",
           divides=(1, 8), trainable=True),
))  # fmt: skip
