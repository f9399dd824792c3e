import os
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest

from phase1.measure.throughput import monitor
from phase1.measure.throughput.disturbances import CpuUse, GpuSample
from phase1.measure.throughput.monitor import Monitor, gpu_sample


class NVMLError(Exception):
    pass


def library(**answers):
    """A pynvml in which a question without an answer fails, as without permission or on an old driver."""

    def asked(name):
        def answer(handle, *arguments):
            if answers[name] is None:
                raise NVMLError
            return answers[name]

        return answer

    return SimpleNamespace(NVMLError=NVMLError, NVML_CLOCK_SM=1, **{name: asked(name) for name in answers})


FULL = {
    "nvmlDeviceGetCurrentClocksEventReasons": 4,
    "nvmlDeviceGetComputeRunningProcesses": ["this", "other"],
    "nvmlDeviceGetClockInfo": 1980,
}


def test_a_sample_holds_clock_reasons_and_programs():
    assert gpu_sample(library(**FULL), "gpu") == GpuSample(sm_clock_mhz=1980, throttling=4, processes=2)


@pytest.mark.parametrize("missing, field", list(zip(FULL, ("throttling", "processes", "sm_clock_mhz"))))
def test_a_question_that_fails_is_none_and_hides_no_other(missing, field):
    sample = gpu_sample(library(**(FULL | {missing: None})), "gpu")
    assert getattr(sample, field) is None
    assert sum(value is None for value in vars(sample).values()) == 1


def test_drivers_before_535_are_asked_under_the_older_name():
    older = {k: v for k, v in FULL.items() if k != "nvmlDeviceGetCurrentClocksEventReasons"}
    assert gpu_sample(library(**older, nvmlDeviceGetCurrentClocksThrottleReasons=32), "gpu").throttling == 32


def test_the_driver_is_asked_at_most_twice_a_second_and_its_silence_is_kept(monkeypatch):
    monkeypatch.setattr(monitor, "nvml", lambda question: None)
    watch = Monitor("cuda")
    for _ in range(5):
        watch.sample()
    assert watch.samples == [GpuSample()]
    monkeypatch.setattr(monitor, "INTERVAL_SECONDS", 0.0)
    watch._next = 0.0
    for _ in range(3):
        watch.sample()
    assert len(watch.samples) == 4


def test_a_run_on_the_cpu_asks_no_driver(monkeypatch):
    monkeypatch.setattr(monitor, "nvml", lambda question: pytest.fail("asked"))
    watch = Monitor("cpu")
    watch.sample()
    assert watch.samples == []


def system(user, idle, own):
    """What psutil says of a machine and of this program, which has two children, one of which ends when it is asked."""

    class Ended(Exception):
        pass

    def process(seconds, children=()):
        def cpu_times():
            if seconds is None:
                raise Ended
            return SimpleNamespace(user=seconds, system=seconds / 2)

        return SimpleNamespace(cpu_times=cpu_times, children=lambda recursive: children if recursive else pytest.fail("one level"))

    every = namedtuple("every", "user system idle iowait steal guest")(user, 1.0, idle, 5.0, 0.5, 0.25)
    this = process(own, [process(own), process(None)])
    return SimpleNamespace(Error=Ended, cpu_times=lambda: every, Process=lambda: this)


def test_cpu_use_is_of_this_program_with_its_children_and_of_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", system(user=10.0, idle=100.0, own=1.0))
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: 50.0)
    watch = Monitor("cpu")
    monkeypatch.setitem(sys.modules, "psutil", system(user=13.0, idle=101.0, own=1.5))
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: 52.0)
    assert watch.cpu_use() == CpuUse(seconds=2.0, busy_seconds=3.0, own_seconds=2 * 0.5 * 1.5, cores=os.cpu_count())


def test_work_of_this_program_is_seen():
    watch, end = Monitor("cpu"), time.process_time() + 0.2
    while time.process_time() < end:
        pass
    use = watch.cpu_use()
    # The system's own count can be below it: what a host takes away may be counted for the process alone.
    assert use is not None and use.own_seconds >= 0.1 and use.seconds > 0 and use.busy_seconds >= 0


def test_without_psutil_the_cpu_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert Monitor("cpu").cpu_use() is None
