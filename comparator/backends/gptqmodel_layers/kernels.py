"""gptqmodel's kernels for one method: what each can multiply, whether it is ready here, and which one `auto` takes.

`auto` takes the fastest that is ready: it never compiles and never downloads. Which kernels there are for a method is a
table in its backend.
"""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from comparator.backends.sizes import TensorSize
from comparator.core.errors import UserError
from comparator.util import streams
from comparator.util.compat.gptqmodel import extension_built

Progress = Callable[[float | None, str], None]


@dataclass(frozen=True)
class Kernel:
    """`backend` and `class_name`: what gptqmodel calls it. `extension`: what has to be compiled, by fp16/bf16 where there are two."""

    name: str
    backend: str
    class_name: str
    device: str  # cpu | cuda | any
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    summary: str
    symmetric_only: bool = False
    divides: tuple[int, int] = (1, 1)  # input and output features come in multiples of these
    extension: str | None = None
    compiles: str = ""  # how long, in words
    capability: tuple[int, int] = (0, 0)
    automatic: bool = True
    trainable: bool = False
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    whole: bool = False  # the model has to lie on the GPU as a whole
    repack: Callable[[TensorSize], TensorSize] | None = None  # a stored tensor → what the kernel makes of it


def for_torch_aten(stored: TensorSize) -> TensorSize:
    """PyTorch's 4-bit CPU kernel reads scales and zeros in one bf16 tensor, and gptqmodel keeps both in bf16 beside it. A
    g_idx is kept with its inverse."""
    state, kind = stored.state_bytes, stored.name.rpartition(".")[2]
    if kind == "scales":  # zeros and scales of as many values, once apart and once together
        return replace(stored, state_bytes=2 * state, copy_bytes=2 * state)
    return replace(stored, state_bytes={"qzeros": 0, "g_idx": 2 * state + 64}.get(kind, state))


@dataclass(frozen=True)
class Packed:
    """What a kernel has to cope with. `sizes`: (input, output features) of every quantized layer."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    dtype: str = "fp16"
    sizes: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Kernels:
    """The kernels for one method, fastest first, per device. `title`: the method as it is spoken of."""

    title: str
    kernels: tuple[Kernel, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(k.name for k in self.kernels)

    def __getitem__(self, name: str) -> Kernel:
        return next(k for k in self.kernels if k.name == name)

    def choose(self, wish: str, packed: Packed, device: str, spread: bool = False) -> Kernel:
        """The kernel to load with. `wish` is a name or "auto"; `spread`: parts of the model lie on the CPU beside a GPU.

        Raises `UserError` where the wish cannot be had here, naming what can.
        """
        able = [k for k in self.kernels if not refusal(k, packed, device, spread)]
        if wish == "auto":
            fits = [k for k in able if k.automatic and ready(k, packed)]
            if not fits:
                raise UserError(
                    f"No {self.title} kernel here multiplies {packed.bits}-bit weights in groups of {packed.group_size}.",
                    "Choose other bits or another group size.",
                )
            return fits[0]
        kernel = self[wish]
        if why := refusal(kernel, packed, device, spread):
            names = ", ".join(k.name for k in able)
            raise UserError(
                f"The kernel {wish} cannot run this: {why}.",
                f"Possible here: {names}; or leave kernel= out." if able else "Choose other bits.",
            )
        return kernel

    def ran(self, column: str | None) -> Kernel | None:
        """The kernel that a column names, which is a library and the name of a class; None for another."""
        return next((k for k in self.kernels if column and column.endswith(k.class_name)), None)

    def trainable(self, device: str, compiling: bool = False) -> list[str]:
        """Names of the kernels with gradients on this device, fastest first; with `compiling` also those that are
        compiled first."""
        kind = "cuda" if device.startswith("cuda") else "cpu"
        usable = (k for k in self.kernels if k.trainable and k.device in ("any", kind))
        return [k.name for k in usable if compiling or k.extension is None]

    def possible(self) -> list[str]:
        """A line for each kernel, for `variants`: what it is and whether it can run here. Imports nothing heavy."""
        return [_line(kernel) for kernel in self.kernels]


def refusal(kernel: Kernel, packed: Packed, device: str, spread: bool = False) -> str | None:
    """Why a kernel cannot take this on this device, or None."""
    on_cuda = device.startswith("cuda")
    if kernel.device == "cuda" and not on_cuda:
        return "it needs an NVIDIA GPU, and this runs on the CPU"
    if kernel.device == "cpu" and on_cuda:
        return "it runs on the CPU only"
    if kernel.whole and spread:
        return "it requires the whole model on the GPU, and max_memory puts a part of it on the CPU"
    if packed.bits not in kernel.bits:
        return f"it supports {_or(kernel.bits)} bits, not {packed.bits}"
    if packed.group_size not in kernel.groups:
        return f"it supports groups of {_or(kernel.groups)}, not {packed.group_size}"
    if kernel.symmetric_only and not packed.sym:
        return "it supports symmetric weights only (sym=true)"
    if packed.dtype not in kernel.dtypes:
        return f"it multiplies in {' or '.join(kernel.dtypes)}, not {packed.dtype}"
    inputs, outputs = kernel.divides
    for one, other in sorted(packed.sizes):
        if one % inputs or other % outputs:
            return f"it requires layers in multiples of {inputs} × {outputs}, and one here is {one} × {other}"
    if on_cuda and kernel.capability > (0, 0):
        import torch

        have = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else kernel.capability
        if have < kernel.capability:
            return f"it requires compute capability {_dotted(kernel.capability)}, and this GPU has {_dotted(have)}"
    return None


def ready(kernel: Kernel, packed: Packed) -> bool:
    """Whether it starts without compiling or downloading."""
    return kernel.extension is None or extension_built(_extension_name(kernel, packed.dtype))


def prepare(kernel: Kernel, packed: Packed, progress: Progress) -> float:
    """Compile what a chosen kernel lacks; returns the seconds it took, 0.0 where nothing had to be done.

    `progress` is called every half second and may raise `Stopped`: the compiler then goes on behind the scenes and
    the next run finds its result. Raises `UserError` when it fails.
    """
    if ready(kernel, packed):
        return 0.0
    if shutil.which("nvcc") is None and not os.path.exists(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")):  # fmt: skip
        raise UserError(
            f"The kernel {kernel.name} has to be compiled first, and there is no CUDA compiler (nvcc) here.",
            "Install the CUDA toolkit, or leave kernel= out: Triton and Torch need no compiler.",
        )
    name = _extension_name(kernel, packed.dtype)
    start = time.perf_counter()

    def build() -> str | None:
        """None, or why it could not be compiled."""
        try:
            from gptqmodel import extension

            return None if all(extension.load(name=name).values()) else extension.error(name) or "unknown"
        except Exception as error:
            return str(error) or "unknown"

    def report() -> None:
        spent = time.perf_counter() - start
        progress(None, f"compiling the kernel {kernel.name} (once, {kernel.compiles}; {spent:.0f} s so far)")

    report()
    why = streams.wait(build, report, 0.5, f"compile {name}")
    if why is not None:
        why = why.strip().splitlines()[-1][:200]
        raise UserError(
            f"The kernel {kernel.name} could not be compiled: {why}",
            "Leave kernel= out, or use kernel=triton, which needs no compiler.",
        )
    return time.perf_counter() - start


def _extension_name(kernel: Kernel, dtype: str) -> str:
    return (kernel.extension or "").format(dtype=dtype)


def _line(kernel: Kernel) -> str:
    gpu = bool(glob.glob("/proc/driver/nvidia/gpus/*")) or os.path.exists("/dev/nvidia0")
    here = kernel.device in ("any", "cuda" if gpu else "cpu")
    state = "possible here"
    if not here:
        state = f"not here (requires {'an NVIDIA GPU' if kernel.device == 'cuda' else 'the CPU'})"
    elif kernel.extension:
        root = Path(os.environ.get("GPTQMODEL_TORCH_EXTENSIONS_DIR", "~/.cache/gptqmodel/torch_extensions"))
        built = list(root.expanduser().glob(f"{kernel.extension.split('_{')[0]}*/**/*.so"))
        state = "compiled here before" if built else "possible here after compiling; auto skips it until then"
    return f"kernel={kernel.name}: {_or(kernel.bits)} bits; {kernel.summary}; {state}"


def _or(numbers: tuple[int, ...]) -> str:
    texts = [str(n) for n in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
