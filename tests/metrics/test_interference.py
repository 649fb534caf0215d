"""Whether something else on the machine disturbed a run: the counters' arithmetic, and a real process in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from comparator.comparison import runner
from comparator.core.request import GenerationSettings, Request
from comparator.core.result import Interference, RunFigures
from comparator.core.variant import Cell
from comparator.metrics import interference
from comparator.metrics.interference import CpuSample, GpuSamples, judge

START = CpuSample(100.0, 40.0, {"1": 2.0, "2": 1.0}, 500.0, 3.0, 2)


def run(wall_s=2.0, own=0.0, waited=0.0, other=0.0, stolen=0.0, gpu=None, cores=2) -> Interference:
    """A run in which this process computed for `own` seconds and waited for `waited`, others computed for `other`."""
    after = CpuSample(
        START.at_s + wall_s, START.own_s + own, {"1": 2.0 + waited, "2": 1.0}, START.busy_s + own + other,
        START.stolen_s + stolen, cores,
    )  # fmt: skip
    return judge(replace(START, cores=cores), after, gpu)


@pytest.mark.parametrize(
    "what, figures, disturbed",
    [
        ("an idle machine", dict(own=4.0), False),
        ("one busy process beside our two threads on two cores", dict(own=2.6, waited=1.3, other=1.3), True),
        ("one busy process beside our one thread on two cores", dict(own=2.0, other=2.0), True),
        ("light background load", dict(own=3.6, waited=0.4, other=0.4), False),
        ("more threads of our own than cores", dict(own=4.0, waited=4.0, other=0.0), False),
        ("others on a machine with cores to spare", dict(own=16.0, other=16.0, cores=64), False),
        ("all other cores busy", dict(own=8.0, waited=0.2, other=7.5, cores=8), True),
        ("a host that runs other machines", dict(own=3.0, stolen=1.0), True),
        ("a run too short for counters of 10 ms", dict(wall_s=0.05, own=0.08, other=0.05), False),
    ],
)
def test_what_disturbs_a_run(what, figures, disturbed):
    found = run(**figures)
    assert bool(found.disturbed) == disturbed, f"{what}: {found}"


def test_the_figures_are_shares_and_cores():
    found = run(own=3.0, waited=1.0, other=1.0, stolen=0.2)
    assert found.cpu_waited_share == pytest.approx(0.25), "waited over what was wanted"
    assert found.other_cores == pytest.approx(0.5) and found.stolen_share == pytest.approx(0.05)
    assert run(own=2.6, waited=1.3, other=1.3).disturbed.startswith(
        "other processes kept 0.7 of 2 cores busy"
    )


def test_a_thread_that_came_or_went_does_not_count_wrongly():
    after = CpuSample(102.0, 44.0, {"2": 1.0, "3": 0.5}, 504.0, 3.0, 2)
    assert judge(START, after).cpu_waited_share == pytest.approx(0.5 / 4.5)


def test_what_the_machine_does_not_have_is_none_and_says_nothing():
    nothing = CpuSample(0.0, 0.0, None, None, None, 2)
    found = judge(nothing, replace(nothing, at_s=2.0, own_s=1.0))
    assert found == Interference(), "a source that is missing was taken for a measurement"


def test_no_proc_at_all_and_a_strange_one(tmp_path):
    sample = interference.sample_cpu(tmp_path)
    assert (sample.waited_s, sample.busy_s, sample.stolen_s) == (None, None, None)
    (tmp_path / "stat").write_text("cpu0 of another kernel\n")
    assert interference.sample_cpu(tmp_path).busy_s is None


@pytest.mark.parametrize(
    "gpu, words",
    [
        (GpuSamples([1.0, 0.98], [(), ()], 0.0, 0), None),
        (GpuSamples([1.0, 1.0], [(), ()], 0.4, 10**9), "used the GPU 40 %"),
        (GpuSamples([0.6, 0.5], [("heat",), ("heat",)], 0.0, 0), "heat (mean clock 55 % of the highest)"),
        (GpuSamples([1.0] * 10, [("heat",), *[()] * 9], 0.0, 0), None),
    ],
)
def test_a_gpu_shared_or_throttled(gpu, words):
    found = run(own=1.0, gpu=gpu)
    assert words in (found.disturbed or "") if words else found.disturbed is None, found


def test_a_process_without_its_own_number_is_the_one_with_the_most_memory():
    assert interference._own({os.getpid(): 1, 7: 2}) == os.getpid()
    assert interference._own({7: 2, 8: 9}) == 8


def test_the_note_names_the_runs():
    calm, bad = RunFigures(1, 2), RunFigures(1, 2, interference=Interference("other processes …"))
    assert interference.note([calm, calm]) is None
    assert interference.note([bad]).startswith("The run was disturbed")
    assert interference.note([calm, bad, calm]).startswith("Run 2 of 3 was disturbed and left out")
    assert interference.note([bad, bad]).startswith("All 2 runs were disturbed")


def test_this_machine_is_read_as_it_is():
    """Our own work is not interference, whoever else computes: it is subtracted from what the cores were busy with."""
    with interference.watch("cpu") as seen:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
    assert seen.found is not None
    if sys.platform == "linux":
        assert 0 <= seen.found.cpu_waited_share < 1 and seen.found.other_cores is not None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [1, os.cpu_count() or 1])
def test_a_busy_process_during_one_columns_run_is_reported_for_that_column_alone(two_layers, count):
    """Ten times: busy processes, one or as many as cores, while the second of three columns runs. What else keeps
    the machine busy disturbs columns too, and is reported, so a try counts only where it was quiet before and after."""
    from comparator.backends import resolve
    from comparator.core.events import Generated, Generating
    from comparator.core.settings import Settings
    from comparator.engine.local import LocalEngine

    variants = ("fp32", "bf16", "nf4")
    request = Request(
        str(two_layers), tuple(Cell(resolve(v)) for v in variants), "Tell me of the sea.", fidelity="none",
        settings=GenerationSettings(max_new_tokens=256, repeats=1),
    )  # fmt: skip
    engine, hogs = LocalEngine(Settings()), []

    def stop() -> None:
        while hogs:
            hogs[-1].kill()
            hogs.pop().wait()

    def emit(event) -> None:
        if isinstance(event, Generating) and event.cell == request.cells[1] and not hogs:
            hogs.extend(subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count))
        if isinstance(event, Generated):
            stop()

    reported, busy = [], 0
    try:
        while len(reported) < 10:
            before = _others()
            document = runner.run(request, engine=engine, emit=emit, cancel=threading.Event())
            if max(before, _others()) > 0.25:
                busy += 1
                if busy == 20:
                    pytest.skip("other processes keep this machine busy")
                continue
            reported.append([bool(c.latency.runs[0].disturbed) for c in document.cells])
    finally:
        stop()
        engine.unload()
    assert reported == [[False, True, False]] * 10


def _others() -> float:
    """Cores that other processes keep busy now."""
    before = interference.sample_cpu()
    time.sleep(0.3)
    return judge(before, interference.sample_cpu()).other_cores or 0.0


def test_a_process_that_computes_for_this_one_counts_as_this_one(tmp_path):
    (tmp_path / "stat").write_text("cpu0 100 0 0 0 0 0 0 0\n")
    for process, waited_ns in (("self", 10**9), ("77", 3 * 10**9)):
        (tmp_path / process / "task" / f"{process}-1").mkdir(parents=True)
        (tmp_path / process / "task" / f"{process}-1" / "schedstat").write_text(f"5 {waited_ns} 9")
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [
        "S",
        *["0"] * 10,
        str(2 * ticks),
        str(ticks),
        *["0"] * 20,
    ]  # after the name: state … utime, stime
    (tmp_path / "77" / "stat").write_text(f"77 (a (odd) name) {' '.join(fields)}")
    alone, both = interference.sample_cpu(tmp_path), interference.sample_cpu(tmp_path, 77)
    assert both.own_s - alone.own_s == pytest.approx(3.0, abs=0.5), (
        "user and system time of the other process"
    )
    assert alone.waited_s == {"self-1": 1.0} and both.waited_s == {"self-1": 1.0, "77-1": 3.0}
