import itertools

import pytest
import torch

from phase1.measure.throughput import timing
from phase1.measure.throughput.timing import StepTime, Stopwatch, median_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_phases_are_the_times_between_marks_and_add_up_to_the_step(monkeypatch):
    clock = iter([10.0, 10.25, 10.75, 11.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch("cpu")
    for name in ("start", "forward", "backward", "optimizer"):
        watch.mark(name)
    assert watch.step_time() == StepTime(forward_ms=250.0, backward_ms=500.0, optimizer_ms=250.0)
    assert watch.step_time().total_ms == 1000.0


def test_micro_batches_are_summed_per_phase(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    watch = Stopwatch("cpu")
    for name in ("start", "forward", "backward", "forward", "backward", "optimizer"):
        watch.mark(name)
    assert watch.step_time() == StepTime(forward_ms=2000.0, backward_ms=2000.0, optimizer_ms=1000.0)


@pytest.mark.parametrize("totals, median", [([3, 1, 2], 2), ([4, 1, 3, 2], 3), ([5], 5)])
def test_the_median_step_is_one_that_was_measured_the_slower_of_the_middle_two(totals, median):
    steps = [StepTime(total / 2, total / 4, total / 4) for total in totals]
    assert median_step(steps).total_ms == median
    assert median_step(steps) in steps


class Event:
    """A CUDA event whose step takes the device 5 ms between marks."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 5.0


def test_on_cuda_the_launch_is_the_hosts_time_and_the_phases_are_the_devices(monkeypatch):
    clock = iter([1.0, 1.001, 1.002, 1.004])
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch("cuda")
    for name in ("start", "forward", "backward", "optimizer"):
        watch.mark(name)
    step = watch.step_time()
    assert (step.total_ms, step.launch_ms) == (15.0, pytest.approx(4.0))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_phase_that_does_the_work_takes_the_time():
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    torch.cuda.synchronize()
    watch = Stopwatch("cuda")
    watch.mark("start")
    watch.mark("forward")
    for _ in range(20):
        a @ a
    watch.mark("backward")
    watch.mark("optimizer")
    step = watch.step_time()
    assert step.backward_ms > 10 * (step.forward_ms + step.optimizer_ms)
