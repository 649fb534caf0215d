"""What else used the processor or the GPU while a run was measured, and whether that disturbed the run.

Needs no root. A CPU is read before and after the run, from Linux's counters: how long the threads of this process
waited for a core (/proc/self/task/*/schedstat), and how long the cores were busy (/proc/stat). A GPU is asked through
NVML, ten times a second for its clocks and once for its processes. What a machine does not have is None, and nothing is
concluded from it.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from comparator.core.result import Interference, RunFigures
from comparator.metrics import nvml
from comparator.util import formatting

WAITED = 0.2  # share of the CPU time wanted that was spent waiting: one busy process beside two threads on two cores
OTHER_CORES = 0.5  # cores busy with other processes that count where no core was left idle
SOME_CORES = 0.25  # fewer than this, and it was threads of this very process that waited for each other
SATURATED = 0.9  # share of the cores that are busy when none is left
STOLEN = 0.1  # share of the time in which the host ran something else than this virtual machine
GPU_BUSY = 0.1  # share of the GPU's time taken by other processes
THROTTLED = 0.2  # share of the samples in which the GPU slowed down to protect itself
SHORTEST_S = 0.2  # /proc/stat counts in steps of 10 ms: over less than this its figures are mostly the step
_PERIOD_S = 0.1
_THROTTLE = {"HwSlowdown": "hardware slowdown", "SwThermalSlowdown": "heat", "HwThermalSlowdown": "heat",
             "HwPowerBrakeSlowdown": "power brake"}  # fmt: skip


@dataclass(frozen=True)
class CpuSample:
    """Counters at one moment, in seconds. None: the machine does not have it."""

    at_s: float
    own_s: float  # CPU time of this process
    waited_s: dict[str, float] | None  # by thread: ready to run, but without a core
    busy_s: float | None  # all processes, on the cores this process may use
    stolen_s: float | None  # taken by the host of a virtual machine
    cores: int


@dataclass
class GpuSamples:
    """What NVML said during a run. `throttled` and `clock_shares`: an entry per sample, () and 1.0 at full clock."""

    clock_shares: list[float] = field(default_factory=list)
    throttled: list[tuple[str, ...]] = field(default_factory=list)
    other_share: float | None = None
    other_bytes: int | None = None


@dataclass
class Watch:
    """`found` is filled when the block ends."""

    found: Interference | None = None


@contextlib.contextmanager
def watch(device: str, child: int | None = None) -> Iterator[Watch]:
    """Sample what else runs on the processor, and on `device` if that is a GPU, while the block runs. `child`: the number
    of a process that computes for this one, and counts as this one."""
    seen, handle = Watch(), nvml.handle(device)
    gpu = GpuSamples() if handle is not None else None
    done, since_us = threading.Event(), int(time.time() * 1e6)
    sampler = threading.Thread(target=_sample_gpu, args=(handle, gpu, done), daemon=True) if gpu else None
    if sampler:
        sampler.start()
    before = sample_cpu(child=child)
    try:
        yield seen
    finally:
        after = sample_cpu(child=child)
        done.set()
        if sampler:
            sampler.join()
            _processes(handle, gpu, since_us)
        seen.found = judge(before, after, gpu)


def judge(before: CpuSample, after: CpuSample, gpu: GpuSamples | None = None) -> Interference:
    """The counters before and after a run, and the samples of its GPU, as shares; `disturbed` says what is too much."""
    wall_s = after.at_s - before.at_s
    own_s = after.own_s - before.own_s
    waited = other = stolen = None
    if before.waited_s is not None and after.waited_s is not None:
        # A thread that began in between has waited from 0; one that ended takes its count with it.
        waited_s = sum(s - before.waited_s.get(thread, 0.0) for thread, s in after.waited_s.items())
        waited = waited_s / (own_s + waited_s) if own_s + waited_s > 0 else 0.0
    if wall_s >= SHORTEST_S:
        if before.busy_s is not None and after.busy_s is not None:
            other = max(0.0, (after.busy_s - before.busy_s - own_s) / wall_s)
        if before.stolen_s is not None and after.stolen_s is not None:
            stolen = (after.stolen_s - before.stolen_s) / (wall_s * after.cores)
    found = Interference(cpu_waited_share=waited, other_cores=other, stolen_share=stolen)
    if gpu is not None:
        found = replace(
            found,
            gpu_other_share=gpu.other_share,
            gpu_other_bytes=gpu.other_bytes,
            gpu_clock_share=statistics.fmean(gpu.clock_shares) if gpu.clock_shares else None,
            gpu_throttled=_often(gpu.throttled),
        )
    reasons = _reasons(found, own_s / wall_s if wall_s > 0 else 0.0, after.cores)
    return replace(found, disturbed="; ".join(reasons) or None)


def note(runs: Sequence[RunFigures]) -> str | None:
    """What a column says of its disturbed runs; None where there are none."""
    disturbed = [(number, run.disturbed) for number, run in enumerate(runs, 1) if run.disturbed]
    if not disturbed:
        return None
    numbers, reason = formatting.join([str(number) for number, _ in disturbed]), disturbed[-1][1]
    if len(runs) == 1:
        return f"The run was disturbed, so its times are not the variant's own: {reason}."
    if len(disturbed) == len(runs):
        return f"All {len(runs)} runs were disturbed, so the times are not the variant's own; the last: {reason}."
    which = (
        f"Run {numbers} of {len(runs)} was" if len(disturbed) == 1 else f"Runs {numbers} of {len(runs)} were"
    )
    return f"{which} disturbed and left out of the times: {reason}."


def _reasons(found: Interference, own_cores: float, cores: int) -> list[str]:
    reasons = []
    waited, other = found.cpu_waited_share or 0.0, found.other_cores
    if other is not None:
        queued = waited >= WAITED and other >= SOME_CORES
        if queued or (other >= OTHER_CORES and other + own_cores >= SATURATED * cores):
            reasons.append(
                f"other processes kept {other:.1f} of {cores} cores busy, and this one waited for a core "
                f"{waited * 100:.0f} % of the time that it could have computed"
            )
    if (found.stolen_share or 0.0) >= STOLEN:
        reasons.append(
            f"the host of this virtual machine withheld {found.stolen_share * 100:.0f} % of the CPU time"
        )
    if (found.gpu_other_share or 0.0) >= GPU_BUSY:
        reasons.append(f"other processes used the GPU {found.gpu_other_share * 100:.0f} % of the time")
    if found.gpu_throttled:
        clock = found.gpu_clock_share
        at = "" if clock is None else f" (mean clock {clock * 100:.0f} % of the highest)"
        reasons.append(f"the GPU was throttled: {', '.join(found.gpu_throttled)}{at}")
    return reasons


def _often(samples: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The reasons that held in at least `THROTTLED` of the samples."""
    every = sorted({reason for reasons in samples for reason in reasons})
    return tuple(r for r in every if sum(r in reasons for reasons in samples) >= THROTTLED * len(samples))


# ---------------------------------------------------------------- CPU


def sample_cpu(proc: Path = Path("/proc"), child: int | None = None) -> CpuSample:
    cores = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    busy, stolen = _cores(proc, set(cores))
    processes = ["self"] if child is None else ["self", str(child)]
    own_s = time.process_time() + (_used(proc / str(child)) if child else 0.0)
    return CpuSample(time.perf_counter(), own_s, _waited(proc, processes), busy, stolen, len(cores))


def _used(process: Path) -> float:
    """CPU time of another process in seconds; 0 where it cannot be read."""
    try:
        values = (process / "stat").read_text().rpartition(")")[2].split()
        return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _waited(proc: Path, processes: Sequence[str] = ("self",)) -> dict[str, float] | None:
    """Seconds that each thread of the processes was ready to run and had no core: the second number of its schedstat."""
    waited = {}
    for path in (p for name in processes for p in (proc / name / "task").glob("*/schedstat")):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that ended in this moment
            waited[path.parent.name] = int(path.read_text().split()[1]) / 1e9
    return waited or None


def _cores(proc: Path, cores: set[int]) -> tuple[float | None, float | None]:
    """(busy, stolen) seconds, summed over `cores`."""
    try:
        lines = [line.split() for line in (proc / "stat").read_text().splitlines()]
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        counts = [[int(n) for n in line[1:]] for line in lines if line[0] in {f"cpu{core}" for core in cores}]
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user and nice
        busy = sum(n[0] + n[1] + n[2] + n[5] + n[6] for n in counts)
        return (busy * tick_s, sum(n[7] for n in counts) * tick_s) if counts else (None, None)
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux, or not this kernel's format
        return None, None


# ---------------------------------------------------------------- GPU


def _sample_gpu(handle: Any, samples: GpuSamples, done: threading.Event) -> None:
    import pynvml

    reasons = {getattr(pynvml, f"nvmlClocksEventReason{name}"): text for name, text in _THROTTLE.items()}
    with contextlib.suppress(pynvml.NVMLError):
        highest = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        while not done.wait(_PERIOD_S):
            held = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            samples.throttled.append(tuple({text for bit, text in reasons.items() if held & bit}))
            samples.clock_shares.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) / highest)


def _processes(handle: Any, samples: GpuSamples, since_us: int) -> None:
    """Memory and time of the GPU that processes other than this one had since `since_us` (µs of the wall clock)."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        held = {p.pid: p.usedGpuMemory or 0 for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        own = _own(held)
        samples.other_bytes = sum(size for pid, size in held.items() if pid != own)
        samples.other_share = 0.0
        used: dict[int, list[int]] = {}
        for entry in pynvml.nvmlDeviceGetProcessUtilization(
            handle, since_us
        ):  # raises where it has no sample
            if entry.timeStamp >= since_us and entry.pid != own and (held.keys() - {own}):
                used.setdefault(entry.pid, []).append(entry.smUtil)
        samples.other_share = sum(statistics.fmean(shares) for shares in used.values()) / 100


def _own(held: dict[int, int]) -> int | None:
    """This process's number as NVML has it. In a container that is the host's number, which cannot be known: the
    process that holds the most memory then."""
    return os.getpid() if os.getpid() in held or not held else max(held, key=held.__getitem__)
