import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from phase1.measure.throughput import interleaved as throughput
from phase1.measure.throughput.interleaved import (
    ThroughputPlan,
    measure_throughput,
    resident_bytes,
    throughput_result,
    throughput_results,
)
from phase1.measure.throughput.monitor import Monitor
from phase1.measure.throughput.rounds import round_order
from phase1.measure.workload import scores_bytes
from phase1.records.schema import Measurement
from phase1.roster import ROLES, TRANSFORMERS, model_config
from phase1.runs import ThroughputRun
from phase1.stats.step_times import speed_ratio, with_ratios
from phase1.training.step import train_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = ThroughputRun(
    vocab_size=300, d_model=32, n_layers=1, n_heads=2, ar_ssm_max_rank=8, ar_ssm_window=8,
    htt_rank=4, htt_dense_rows=64, htt_groups=16,
)  # fmt: skip
MODELS = {role: model_config(role, SHAPE) for role in ROLES}
PLAN = ThroughputPlan(seq_lengths=(32, 16), batch_size=2, warmup_steps=1, measure_steps=3)


@pytest.fixture(scope="module")
def measured():
    return measure_throughput(MODELS, PLAN, "cpu")


@pytest.fixture
def calls(monkeypatch):
    """Every step taken, as (mixer and recomputation of the model, T); set `fails` to make some raise."""
    taken, fails = [], {}

    def step(state, batches, mark):
        config, T = state.model.config, batches[0][0].shape[1]
        taken.append(((config.mixer, config.recompute), T))
        error = fails.get((config.mixer, config.recompute, T))
        if error is not None:
            raise error
        return train_step(state, batches, mark)

    monkeypatch.setattr(throughput, "train_step", step)
    return taken, fails


def test_every_model_is_measured_at_every_length_shortest_first(measured):
    for contender in measured.values():
        assert [m.seq_length for m in contender.measurements] == [16, 32]
        assert all(m.status == "ok" and m.batch_size == 2 and len(m.step_times_ms) == 3 for m in contender.measurements)


def test_phases_add_up_to_the_total_and_throughput_follows_from_it(measured):
    for contender in measured.values():
        for m in contender.measurements:
            assert m.total_time_ms == pytest.approx(m.forward_time_ms + m.backward_time_ms + m.optimizer_time_ms, rel=1e-12)
            assert min(m.forward_time_ms, m.backward_time_ms, m.optimizer_time_ms) > 0
            assert m.total_time_ms == sorted(m.step_times_ms)[1]
            assert m.tokens_per_second == pytest.approx(2 * m.seq_length / (m.total_time_ms / 1e3), rel=1e-12)
            assert m.samples_per_second == pytest.approx(2 / (m.total_time_ms / 1e3), rel=1e-12)


def test_models_take_their_steps_in_turn_and_warm_up_is_not_counted(calls):
    contenders = measure_throughput(MODELS, PLAN, "cpu")
    order = [("attention", "none"), ("attention", "block"), ("attention", "none"), ("ar_ssm", "block")]
    numbers = range(-PLAN.warmup_steps, PLAN.measure_steps)
    rounds = [[order[i] for i in round_order(range(4), number)] for number in numbers]
    assert calls[0] == [(model, T) for T in (16, 32) for turn in rounds for model in turn]
    assert all(contender.excluded_seconds > 0 for contender in contenders.values())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_over_the_rounds_of_a_design_each_model_has_every_place_and_follows_every_other_equally_often(n):
    names = list("ABCDEF"[:n])
    rounds = [round_order(names, number) for number in range(n if n % 2 == 0 else 2 * n)]
    assert all(sorted(turn) == names for turn in rounds)
    places = Counter((name, place) for turn in rounds for place, name in enumerate(turn))
    follows = Counter(pair for turn in rounds for pair in itertools.pairwise(turn))
    assert len(places) == n * n and len(set(places.values())) == 1
    assert len(follows) == n * (n - 1) and len(set(follows.values())) <= 1


def test_the_device_is_watched_during_measured_steps_only(calls):
    samples = itertools.count()
    measure_throughput(MODELS, PLAN, "cpu", in_flight=lambda: next(samples))
    assert next(samples) == 2 * 3 * 4


def test_ratios_are_of_the_same_rounds_and_the_baselines_own_is_1(measured):
    results = throughput_results(measured)
    for role, result in results.items():
        for m, base in zip(result.measurements, results["baseline"].measurements):
            ratio, _ = speed_ratio(m.step_times_ms, base.step_times_ms)
            assert m.ratio_to_baseline == ratio and m.ratio_ci95 is None, "three rounds have no interval"
            assert m.tokens_per_second_ci95 is None and (role != "baseline" or ratio == 1.0)
    alone = throughput_results({"phase1": measured["phase1"]})["phase1"]
    assert all(m.ratio_to_baseline is None for m in alone.measurements)


def test_five_rounds_have_intervals_that_hold_the_medians():
    plan = ThroughputPlan(seq_lengths=(16,), batch_size=2, warmup_steps=1, measure_steps=5)
    results = throughput_results(measure_throughput(MODELS, plan, "cpu"))
    for role, result in results.items():
        (m,) = result.measurements
        low, high = m.tokens_per_second_ci95
        assert low <= m.tokens_per_second <= high
        assert (m.ratio_ci95 is None) == (role == "baseline")
        assert role == "baseline" or m.ratio_ci95[0] <= m.ratio_to_baseline <= m.ratio_ci95[1]
        assert m.launch_time_ms is None, "the CPU launches nothing"


def test_a_ratio_needs_the_same_rounds_and_sizes():
    m = Measurement(seq_length=8, batch_size=2, status="ok", total_time_ms=1.0, tokens_per_second=1.0, step_times_ms=[1.0, 1.0])
    changes = ({"seq_length": 16}, {"batch_size": 1}, {"step_times_ms": [1.0]}, {"step_times_ms": []})
    for other in (m.model_copy(update=change) for change in changes):
        assert with_ratios([other], [m])[0].ratio_to_baseline is None
    assert with_ratios([m], [m])[0].ratio_to_baseline == 1.0


def test_a_model_may_run_with_a_batch_size_of_its_own():
    plan = ThroughputPlan((16,), 4, 1, 2, batch_sizes={"baseline_optimized": 1})
    results = throughput_results(measure_throughput(MODELS, plan, "cpu"))
    assert [r.measurements[0].batch_size for r in results.values()] == [4, 1, 4, 4]
    assert results["baseline_optimized"].measurements[0].ratio_to_baseline is None
    assert results["phase1"].measurements[0].ratio_to_baseline > 0


def test_scores_that_do_not_fit_the_memory_of_a_cpu_are_out_of_memory_before_the_system_ends_the_process(monkeypatch):
    monkeypatch.setattr(throughput, "free_ram_bytes", lambda: scores_bytes(MODELS["baseline"], 2, 20))
    models = {"quadratic_control": model_config("quadratic_control", SHAPE), "phase1": MODELS["phase1"]}
    contenders = measure_throughput(models, PLAN, "cpu")
    assert [m.status for m in contenders["quadratic_control"].measurements] == ["ok", "oom"]
    assert "the attention scores take" in contenders["quadratic_control"].measurements[1].detail
    assert [m.status for m in contenders["phase1"].measurements] == ["ok", "ok"]


def test_progress_is_called_once_per_step_and_model():
    ticks = []
    measure_throughput({"phase1": MODELS["phase1"]}, PLAN, "cpu", ticks.append)
    assert ticks == [2 * 16] * 4 + [2 * 32] * 4


def test_running_out_of_memory_at_a_length_ends_that_model_and_no_other(calls, monkeypatch):
    monkeypatch.delitem(MODELS, "baseline_fast")  # as its calls look the same
    calls[1][("attention", "none", 32)] = torch.OutOfMemoryError("CUDA out of memory.")
    contenders = measure_throughput(MODELS, ThroughputPlan((16, 32, 64), 2, 1, 2), "cpu")
    result = throughput_result("baseline", contenders["baseline"])
    assert [m.status for m in result.measurements] == ["ok", "oom", "oom"]
    assert result.measurements[1].detail == "CUDA out of memory.; try --batch-size 1, then --seq-lengths below 32"
    assert "skipped" in result.measurements[2].detail
    assert result.status == "ok" and result.detail.startswith("T=32: CUDA out of memory.")
    assert contenders["baseline"].state is None, "its memory is free for the others"
    assert [m.status for m in contenders["phase1"].measurements] == ["ok"] * 3
    assert calls[0].count((("attention", "none"), 32)) == 1 and (("attention", "none"), 64) not in calls[0]


def test_a_model_that_fails_at_once_is_an_error_and_the_others_are_measured(calls):
    calls[1][("ar_ssm", "block", 16)] = RuntimeError("boom")
    contenders = measure_throughput(MODELS, PLAN, "cpu")
    result = throughput_result("phase1", contenders["phase1"])
    assert (result.status, result.scaling) == ("error", None)
    assert "RuntimeError: boom" in result.detail
    assert all(m.status == "ok" for m in contenders["baseline"].measurements)


def test_a_model_that_cannot_be_made_is_recorded(monkeypatch):
    def fails(config, device, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(throughput, "make_workload", fails)
    result = throughput_result("phase1", measure_throughput({"phase1": MODELS["phase1"]}, PLAN, "cpu")["phase1"])
    assert result.status == "oom" and result.parameters is None and "no room" in result.detail


def test_an_interrupt_passes(calls):
    calls[1][("ar_ssm", "block", 16)] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        measure_throughput(MODELS, PLAN, "cpu")


def test_a_result_holds_the_model_its_parameters_and_its_fit(measured):
    result = throughput_result("phase1", measured["phase1"])
    assert (result.model_name, result.status, result.basis) == ("phase1", "ok", "measured")
    assert result.config_id == MODELS["phase1"].config_id and result.parameters.total > 0
    assert result.scaling.verdict == "inconclusive"  # two lengths
    assert result.measurements[0].peak_allocated_bytes is None  # the CPU's allocator keeps no count


def test_resident_bytes_count_a_storage_once_in_blocks_of_512():
    x = torch.zeros(200)
    assert resident_bytes([x, x.view(2, 100), torch.zeros(1)]) == 1024 + 512


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_peak_of_a_model_does_not_count_the_models_beside_it():
    lengths = ThroughputPlan((256,), 2, 2, 3)
    models = {role: model_config(role, ThroughputRun()) for role in ROLES}
    together = measure_throughput(models, lengths, "cuda")
    for role, config in models.items():
        alone = measure_throughput({role: config}, lengths, "cuda")[role].measurements[0]
        beside = together[role].measurements[0]
        assert beside.peak_allocated_bytes == pytest.approx(alone.peak_allocated_bytes, rel=0.03)
        assert beside.total_time_ms == pytest.approx(
            beside.forward_time_ms + beside.backward_time_ms + beside.optimizer_time_ms, rel=1e-9
        )


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_launches_clocks_and_a_quadratic_control_are_seen():
    models = {role: model_config(role, ThroughputRun()) for role in ("phase1", "quadratic_control")}
    watch = Monitor("cuda")
    plan = ThroughputPlan((1024, 2048, 4096, 8192), 1, 3, 10)
    results = throughput_results(measure_throughput(models, plan, "cuda", in_flight=watch.sample))
    for result in results.values():
        assert all(0 < m.launch_time_ms < 1.1 * m.total_time_ms for m in result.measurements)
    assert results["quadratic_control"].scaling.verdict == "not linear"
    assert len(watch.samples) >= 2 and any(sample.sm_clock_mhz for sample in watch.samples)


def test_with_graphs_the_peak_is_that_of_eager_steps_which_leave_no_gradients(monkeypatch):
    """The pass of its own, on a state that says it launches graphs: what it does to the model does not need a GPU."""
    contender = throughput.TimedModel(MODELS["phase1"], 2)
    throughput._make(contender, "cpu", PLAN, False)
    contender.state.config = replace(contender.state.config, cuda_graphs=True)
    taken = []
    monkeypatch.setattr(throughput, "train_step", lambda state, batches: (taken.append(state), train_step(state, batches)))
    throughput._prepare(contender, 16)
    assert len(taken) == 2 and not any(state.config.cuda_graphs for state in taken)
    assert all(state.model is contender.state.model and state.optimizer is contender.state.optimizer for state in taken)
    assert all(parameter.grad is None for parameter in contender.state.model.parameters()), "a capture makes its own"
    assert contender.ran is not None and contender.state.config.cuda_graphs


def test_the_fastest_transformer_of_each_length_is_what_the_engine_is_compared_with(measured):
    results = throughput_results(measured)
    for i, m in enumerate(results["phase1"].measurements):
        speeds = {role: results[role].measurements[i].tokens_per_second for role in TRANSFORMERS}
        assert m.fastest == max(speeds, key=speeds.get) and m.ratio_to_fastest <= 1.2 * m.ratio_to_baseline
    own = results[results["phase1"].measurements[0].fastest].measurements[0]
    assert own.ratio_to_fastest == 1.0 and own.ratio_to_fastest_ci95 is None
    alone = throughput_results({"phase1": measured["phase1"]})["phase1"].measurements
    assert all(m.fastest is None and m.ratio_to_fastest is None for m in alone)
