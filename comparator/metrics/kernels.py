"""The device time of a decode step per kernel, from torch's profiler; on a CPU per PyTorch operation.

The step itself is timed without the profiler, which would slow it down.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """One kernel's share of a step. `calls` and `seconds` are per step; `name` is the profiler's, shortened."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class StepProfile:
    """`step_s`: one step without the profiler. `kernels`: the slowest first. `covered_s`: the part of a step in which at
    least one kernel runs; the rest of `step_s` is the time between kernels."""

    step_s: float
    kernels: tuple[Kernel, ...]
    covered_s: float

    @property
    def busy_s(self) -> float:
        """Sum over all kernels of a step: more than `covered_s` if some run on parallel streams."""
        return sum(k.seconds for k in self.kernels)


def profile(step: Callable[[], object], device: str, steps: int = 8) -> StepProfile:
    """Run `step` 2 + 2 · `steps` times: to warm up, timed, and profiled. Times are means per step."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = device.startswith("cuda")
    synchronize = (lambda: torch.cuda.synchronize(device)) if cuda else (lambda: None)
    step(), step(), synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    step_s = (time.perf_counter() - start) / steps
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        synchronize()
    sums: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros > 0 and _is_kernel(event.key):
            totals = sums.setdefault(short(event.key), [0.0, 0.0])
            totals[0] += event.count / steps
            totals[1] += micros * 1e-6 / steps
    kernels = (Kernel(name, calls, seconds) for name, (calls, seconds) in sums.items())
    device_type = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    times = (
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == device_type and _is_kernel(event.name)
    )
    covered_s = covered(times) * 1e-6 / steps
    return StepProfile(step_s, tuple(sorted(kernels, key=lambda k: -k.seconds)), covered_s)


def covered(times: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(times):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _is_kernel(name: str) -> bool:
    return not name.startswith(("cuda", "ProfilerStep", "Activity Buffer"))


def short(name: str) -> str:
    """A kernel's name without its return type, arguments and most of its template."""
    name = re.sub(r"^void\s+|\(anonymous namespace\)::|at::native::|at::cuda::", "", name)
    signature = name.split("(")[0] if not name.startswith("(") else name
    head, _, template = signature.partition("<")
    inner = ", ".join(re.findall(r"\b[A-Z]\w*(?:Functor|Op|Ops)\w*|\w*(?:copy|fill|cat)\w*", template)[:2])
    return (f"{head}<{inner}>" if inner else head)[:70]
