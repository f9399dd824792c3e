import time
from types import SimpleNamespace

import pytest

from phase1.measure import monitor
from phase1.measure.conditions import GpuSample
from phase1.measure.monitor import Monitor, gpu_sample


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


def test_cpu_use_is_of_this_program_and_of_all():
    def spin():
        watch, end = Monitor("cpu"), time.perf_counter() + 0.3
        while time.perf_counter() < end:
            pass
        use = watch.cpu_use()
        assert use is not None and use.cores >= 1 and use.seconds >= 0.3
        return use

    def consistent(use):
        return 0.1 <= use.own_seconds <= min(use.seconds, use.busy_seconds) + 0.1  # clocks of 10 ms, twice

    # A virtual machine whose host takes its cores away counts that time for the process and not for the system.
    assert any(consistent(spin()) for _ in range(5))


def test_without_psutil_the_cpu_is_unknown(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert Monitor("cpu").cpu_use() is None
