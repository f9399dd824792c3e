import itertools

import pytest
import torch

from phase1.config import ROLES, ThroughputRun, model_config
from phase1.measure import throughput
from phase1.measure.throughput import ThroughputPlan, measure_throughput, resident_bytes, throughput_result
from phase1.train import train_step

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
    """Every step taken, as (mixer and checkpointing of the model, T); set `fails` to make some raise."""
    taken, fails = [], {}

    def step(state, batches, mark):
        config, T = state.model.config, batches[0][0].shape[1]
        taken.append(((config.mixer, config.checkpointing), T))
        error = fails.get((config.mixer, config.checkpointing, T))
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
    order = [("attention", False), ("attention", True), ("ar_ssm", True)]
    assert calls[0] == [(model, T) for T in (16, 32) for _ in range(4) for model in order]
    assert all(contender.excluded_seconds > 0 for contender in contenders.values())


def test_progress_is_called_once_per_step_and_model():
    ticks = itertools.count()
    measure_throughput({"phase1": MODELS["phase1"]}, PLAN, "cpu", lambda: next(ticks))
    assert next(ticks) == 2 * 4


def test_running_out_of_memory_at_a_length_ends_that_model_and_no_other(calls):
    calls[1][("attention", False, 32)] = torch.OutOfMemoryError("CUDA out of memory.")
    contenders = measure_throughput(MODELS, ThroughputPlan((16, 32, 64), 2, 1, 2), "cpu")
    result = throughput_result("baseline", contenders["baseline"])
    assert [m.status for m in result.measurements] == ["ok", "oom", "oom"]
    assert result.measurements[1].detail == "CUDA out of memory.; try --batch-size 1, then --seq-lengths below 32"
    assert "skipped" in result.measurements[2].detail
    assert result.status == "ok" and result.detail.startswith("T=32: CUDA out of memory.")
    assert contenders["baseline"].state is None, "its memory is free for the others"
    assert [m.status for m in contenders["phase1"].measurements] == ["ok"] * 3
    assert calls[0].count((("attention", False), 32)) == 1 and (("attention", False), 64) not in calls[0]


def test_a_model_that_fails_at_once_is_an_error_and_the_others_are_measured(calls):
    calls[1][("ar_ssm", True, 16)] = RuntimeError("boom")
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
    calls[1][("ar_ssm", True, 16)] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        measure_throughput(MODELS, PLAN, "cpu")


def test_a_result_holds_the_model_its_parameters_and_its_fit(measured):
    result = throughput_result("phase1", measured["phase1"])
    assert (result.model_name, result.status, result.measured) == ("phase1", "ok", "measured")
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
