import numpy as np
import pytest

from phase1.measure.throughput.disturbances import (
    BRAKE,
    POWER_CAP,
    THERMAL,
    CpuUse,
    GpuSample,
    host_bound,
    model_warnings,
    run_warnings,
)
from phase1.records.schema import Measurement

QUIET = [GpuSample(sm_clock_mhz=1980, throttling=0, processes=1)] * 20
IDLE_CPU = CpuUse(seconds=10.0, busy_seconds=10.5, own_seconds=10.0, cores=16)


def measurement(seq_length, ms, steps=None, launch=None):
    return Measurement(
        seq_length=seq_length, batch_size=4, status="ok", total_time_ms=ms, tokens_per_second=1.0,
        step_times_ms=list(map(float, steps if steps is not None else [ms] * 20)), launch_time_ms=launch,
    )  # fmt: skip


def test_a_quiet_run_has_no_warning():
    assert run_warnings(QUIET, IDLE_CPU) == []
    assert run_warnings([], None) == [], "on a laptop that says nothing"


@pytest.mark.parametrize(
    "bits, words",
    [
        (THERMAL, ("too hot", "10%", "cool it")), (0x40, ("too hot",)), (BRAKE, ("power brake", "power supply")),
        (POWER_CAP, ("power limit", "same limit")),
    ],
)  # fmt: skip
def test_throttling_is_named_with_its_share_and_its_remedy(bits, words):
    samples = QUIET[:18] + [GpuSample(1980, bits, 1)] * 2
    (warning,) = run_warnings(samples, None)
    assert all(word in warning for word in words)


@pytest.mark.parametrize("bits", [0x0, 0x1, 0x2, 0x100])
def test_idle_and_clocks_set_by_the_user_are_no_throttling(bits):
    assert run_warnings([GpuSample(1980, bits, 1)] * 5, None) == []


def test_a_clock_that_changes_by_more_than_3_percent_is_named():
    falling = [GpuSample(sm_clock_mhz=clock) for clock in np.linspace(1980, 1755, 40).astype(int).tolist()]
    (warning,) = run_warnings(falling, None)
    assert "from 1971 to 1763 MHz" in warning and "-11%" in warning and "--warmup-steps" in warning
    steady = [GpuSample(sm_clock_mhz=clock) for clock in [1980, 1950] * 20]
    assert run_warnings(steady, None) == []


def test_other_programs_on_the_gpu_are_counted_without_this_one():
    (warning,) = run_warnings([GpuSample(1980, 0, 1), GpuSample(1980, 0, 3)], None)
    assert "up to 2" in warning and "stop them" in warning
    assert run_warnings([GpuSample(1980, 0, 0)], None) == [], "in a container that hides them"


@pytest.mark.parametrize("busy, cores, warned", [(25.0, 2, True), (11.0, 2, False), (25.0, 16, False), (35.0, 16, True)])
def test_other_programs_on_a_tenth_of_the_cores_are_named(busy, cores, warned):
    warnings = run_warnings([], CpuUse(seconds=10.0, busy_seconds=busy, own_seconds=10.0, cores=cores))
    assert bool(warnings) == warned
    if warned:
        assert f"{(busy - 10) / 10:.1f} of {cores} CPU cores" in warnings[0]


def test_a_gpu_whose_driver_says_nothing_is_said_to_be_unwatched():
    (warning,) = run_warnings([GpuSample()] * 3, None)
    assert "nvidia-ml-py" in warning


def test_missing_answers_hide_no_others():
    (warning,) = run_warnings([GpuSample(None, THERMAL, None)] * 3, None)
    assert "100%" in warning


def test_unstable_steps_are_named_by_length():
    rng = np.random.default_rng(0)
    shaky = measurement(512, 10.0, 10 + 2 * rng.normal(size=20))
    (warning,) = model_warnings([measurement(1024, 20.0), shaky], "cpu")
    assert "unstable steps at T = 512 (" in warning and "1,024" not in warning and "--measure-steps" in warning


def test_a_drift_is_named_with_its_size():
    steps = np.concatenate([np.full(10, 10.0), np.full(10, 10.8)]) + 0.01 * np.arange(20)
    (warning,) = model_warnings([measurement(2048, 10.4, steps)], "cpu")
    assert "drift at T = 2,048 (+9%)" in warning and "--warmup-steps" in warning


def test_failed_lengths_and_few_steps_give_no_warning():
    failed = Measurement(seq_length=8192, batch_size=4, status="oom", detail="out of memory")
    assert model_warnings([measurement(512, 1.0, [1.0, 9.0, 1.0]), failed], "cuda") == []


def test_steps_that_last_as_long_as_their_launch_and_do_not_grow_are_host_bound_on_a_gpu():
    steps = [measurement(T, ms, launch=60.0) for T, ms in ((512, 61.0), (1024, 62.0), (2048, 90.0), (4096, 180.0))]
    assert host_bound(steps) == [512]  # 1,024 lasts as long as its launch too, but the next is 1.45 times as long
    (warning,) = model_warnings(steps, "cuda")
    assert "host-bound at T = 512" in warning and "--compile" in warning
    assert model_warnings(steps, "cpu") == []


def test_a_host_that_waits_for_a_full_queue_is_not_the_limit():
    steps = [measurement(T, T / 8, launch=0.95 * T / 8) for T in (512, 1024, 2048, 4096)]
    assert host_bound(steps) == []


def test_a_single_length_is_judged_by_its_launch_alone():
    assert host_bound([measurement(512, 61.0, launch=60.0)]) == [512]
    assert host_bound([measurement(512, 61.0, launch=20.0)]) == []
    assert host_bound([measurement(512, 61.0)]) == []


def test_without_launch_times_growth_decides_as_in_the_recorded_run():
    times = ((512, 208.97), (1024, 209.18), (2048, 228.46), (4096, 260.37))
    assert host_bound([measurement(T, ms) for T, ms in times]) == [512, 1024, 2048, 4096]
