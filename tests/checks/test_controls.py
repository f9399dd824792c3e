import numpy as np
import pytest

from phase1.checks.controls import a_a_check, control_check
from phase1.measure.throughput.rounds import round_order
from phase1.measure.workload import control_batch_size, scores_bytes
from phase1.records.schema import Measurement, ThroughputResult, read_report
from phase1.roster import model_config
from phase1.runs import ThroughputRun
from phase1.stats.scaling import fit_scaling
from tests.reports import common, failed
from tests.stats.noise import H100, NOISE

LENGTHS = (512, 1024, 2048, 4096)
DETAILS = {"status": "oom", "detail": "out of memory"}


def result(role, times):
    """A throughput result whose raw step times are `times`, a list per length."""
    measurements = [
        Measurement(
            seq_length=length, batch_size=4, status="ok", total_time_ms=float(np.median(t)), tokens_per_second=1.0,
            step_times_ms=list(map(float, t)),
        )
        for length, t in zip(LENGTHS, times)
    ]  # fmt: skip
    return ThroughputResult(**common(role), measurements=measurements)


def a_a(noise, rng, rounds=20, ratio=1.0):
    pairs = [np.exp(noise(rng, rounds)) for _ in LENGTHS]
    return a_a_check(result("baseline", [ratio * b for _, b in pairs]), result("baseline", [a for a, _ in pairs]))


@pytest.mark.parametrize("kind", NOISE)
def test_copies_are_found_different_in_fewer_than_5_of_100_runs(kind):
    rng = np.random.default_rng(0)
    alarms = sum(a_a(NOISE[kind], rng).status == "fail" for _ in range(1000))
    assert alarms < 50  # 19 to 46


@pytest.mark.parametrize("kind", NOISE)
def test_a_difference_of_5_percent_is_found_in_most_runs(kind):
    rng = np.random.default_rng(1)
    found = sum(a_a(NOISE[kind], rng, ratio=1.05).status == "fail" for _ in range(200))
    assert found > 140  # 166 on the noisy host, 190 and more elsewhere


def test_a_pass_says_which_differences_it_excludes_and_a_failure_where_it_is():
    rng = np.random.default_rng(2)
    check = a_a(NOISE["independent"], rng)
    assert (check.name, check.status, check.limit) == ("a_a_no_difference", "pass", None)
    assert "98.75%" in check.detail and "% are excluded" in check.detail and 0 < check.value < 3
    check = a_a(NOISE["independent"], rng, ratio=1.2)
    assert check.status == "fail" and check.value == pytest.approx(100 * (1 - 1 / 1.2), abs=2)
    assert "at T = 512" in check.detail and "stop other programs" in check.detail


def test_too_few_rounds_decide_nothing_and_the_check_says_how_many_would():
    rng = np.random.default_rng(3)
    check = a_a(NOISE["independent"], rng, rounds=7, ratio=3.0)
    assert check.status == "inconclusive" and "--measure-steps 8" in check.detail
    assert a_a(NOISE["independent"], rng, rounds=8, ratio=3.0).status == "fail"


def test_copies_that_share_no_length_decide_nothing():
    failed = Measurement(seq_length=512, batch_size=4, **DETAILS)
    copy = result("baseline", [[1.0] * 20]).model_copy(update={"measurements": [failed]})
    assert a_a_check(copy, result("baseline", [[1.0] * 20])).status == "inconclusive"


def carried_over(order_of, models, rounds=20, seed=0):
    """Times of `models` in rounds where a step after the heavy model is 5 % slower."""
    rng, times, before = np.random.default_rng(seed), {model: [] for model in models}, ""
    for number in range(rounds):
        for model in order_of(models, number):
            times[model].append(float(np.exp(0.01 * rng.normal())) * (1.05 if before == "heavy" else 1.0))
            before = model
    return times


@pytest.mark.parametrize("models", [["baseline", "heavy", "baseline_again"], ["baseline", "light", "heavy", "baseline_again"]])
def test_balanced_orders_take_the_effect_of_the_step_before_out_of_the_ratio(models):
    fixed, balanced = (
        [carried_over(order, models, seed=seed) for seed in range(100)] for order in (lambda names, _: names, round_order)
    )
    alarms = [
        sum(
            a_a_check(*(result("baseline", [t[name]]) for name in ("baseline_again", "baseline"))).status == "fail"
            for t in runs
        )
        for runs in (fixed, balanced)
    ]
    assert alarms[0] > 90 and alarms[1] <= 5


def test_the_recorded_run_finds_its_models_different():
    results = read_report(H100, "throughput").results
    assert a_a_check(results["phase1"], results["baseline"]).status == "fail"


def control(seconds):
    times = [[1e3 * s] * 20 for s in seconds]
    made = result("baseline_optimized", times)
    return made.model_copy(update={"scaling": fit_scaling(LENGTHS, seconds, times)})


def test_a_quadratic_control_is_rejected():
    check = control_check(control([0.02, 0.05, 0.17, 0.65]))
    assert (check.name, check.status) == ("control_rejected", "pass") and check.value > 1
    assert "not linear" in check.detail and "lengths up to 4,096" in check.detail


def test_a_control_that_starts_host_bound_is_rejected_by_its_last_octave():
    assert control_check(control([0.063, 0.063, 0.1, 0.4])).status == "pass"


def test_a_control_called_linear_fails_and_an_undecided_one_decides_nothing():
    check = control_check(control([0.02, 0.04, 0.08, 0.16]))
    assert check.status == "fail" and "not thereby told from a quadratic one" in check.detail
    check = control_check(control([0.063, 0.063, 0.063, 0.07]))
    assert check.status == "inconclusive" and "not thereby told" in check.detail


def test_lengths_at_which_the_control_ran_out_of_memory_are_named_and_the_others_count():
    made = control([0.02, 0.05, 0.17, 0.65])
    longer = Measurement(seq_length=8192, batch_size=4, **DETAILS)
    check = control_check(made.model_copy(update={"measurements": [*made.measurements, longer]}))
    assert check.status == "pass" and "4,096, 1 longer failed" in check.detail


def test_a_control_measured_nowhere_decides_nothing():
    check = control_check(ThroughputResult(**failed("baseline_optimized")))
    assert check.status == "inconclusive" and "out of memory" in check.detail and "--batch-size" in check.detail


def test_the_control_runs_with_the_largest_batch_whose_scores_fit():
    config = model_config("quadratic_control", ThroughputRun())
    one = scores_bytes(config, 1, 4096)
    assert control_batch_size(config, 4, 4096, 8 * one) == 4
    assert control_batch_size(config, 4, 4096, 8 * one - 1) == 2
    assert control_batch_size(config, 4, 4096, 1) == 1
    assert control_batch_size(config, 4, 4096, None) == 4
