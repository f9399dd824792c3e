from dataclasses import replace

import pytest

from phase1.config import EngineShape
from phase1.measure.throughput import efficiency
from phase1.measure.throughput.efficiency import card_of, step_flops, with_efficiency
from phase1.model import LanguageModel
from phase1.roster import ROLES, model_config
from tests.reports import throughput_result

SHAPE = EngineShape(
    copy_window=4,
    vocab_size=300, d_model=32, n_layers=3, n_heads=2, ar_ssm_max_rank=8, ar_ssm_window=8, htt_rank=4, htt_dense_rows=64,
    htt_groups=16,
)  # fmt: skip
H100 = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 85_000_000_000}
CONFIG = model_config("phase1", SHAPE)


@pytest.mark.parametrize("role", ["baseline", "baseline_optimized", "quadratic_control"])
@pytest.mark.parametrize("B, T", [(1, 16), (2, 50)])
def test_the_transformers_flops_are_those_of_the_hand_formula(role, B, T):
    config = model_config(role, SHAPE)
    weights = sum(p.numel() for p in LanguageModel(config).parameters() if p.ndim == 2)  # the tied table once, no norms
    L, D = config.n_layers, config.d_model
    assert step_flops(config, B, T) == 6 * weights * B * T + 12 * L * D * B * T**2


def test_recomputation_and_the_kind_of_loss_are_no_model_flops():
    assert step_flops(CONFIG, 4, 64) == step_flops(replace(CONFIG, checkpointing=False), 4, 64)
    assert step_flops(model_config("baseline", SHAPE), 1, 16) == step_flops(model_config("baseline_optimized", SHAPE), 1, 16)


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_flops_from_one_and_two_blocks_are_those_of_all(role):
    config = replace(model_config(role, SHAPE), checkpointing=False, attention="math", loss="chunked")
    assert step_flops(config, 4, 64) == efficiency._counted(config, 4, 64)


def test_the_count_of_a_long_sequence_follows_from_shorter_ones(monkeypatch):
    counted = step_flops(CONFIG, 1, 3 * efficiency.LINEAR_FROM)
    monkeypatch.setattr(efficiency, "FAR", 2)
    assert step_flops(CONFIG, 1, 3 * efficiency.LINEAR_FROM) == pytest.approx(counted, rel=1e-3)


def test_four_times_the_length_takes_the_engine_four_times_the_flops_and_the_transformer_more():
    growth = {
        role: step_flops(model_config(role, SHAPE), 4, 256) / step_flops(model_config(role, SHAPE), 4, 64) for role in ROLES
    }
    assert growth["phase1"] < 4.01 and growth["baseline"] > 4.5


def test_mfu_is_flops_over_seconds_and_peak_and_traffic_is_28_bytes_per_parameter():
    card, basis = card_of(H100)
    result = throughput_result("phase1", [0.021, 0.041], (64, 256))
    found = with_efficiency(result, CONFIG, card, basis, "float16")
    for m, seconds in zip(found.measurements, (0.021, 0.041)):
        assert m.model_flops == step_flops(CONFIG, 4, m.seq_length)
        assert m.achieved_flops_per_second == pytest.approx(m.model_flops / seconds)
        assert m.mfu == pytest.approx(m.achieved_flops_per_second / 989.4e12)
        assert m.optimizer_bytes_per_second == pytest.approx(20 * result.parameters.total / (0.1 * seconds))
        assert m.bandwidth_utilization == pytest.approx(m.optimizer_bytes_per_second / 3352e9)
    assert found.peak_basis == "989.4e12 FP16 FLOP/s, 3352e9 bytes/s (NVIDIA H100 80GB HBM3)"
    assert found.warnings == []


@pytest.mark.parametrize(
    "facts, precision, reason",
    [
        ({"gpu": None}, "float32", "no peak is known for a CPU"),
        (
            {"gpu": "NVIDIA Imaginary 9000", "gpu_memory_bytes": 8 * 10**9},
            "float16",
            "no peak is known for NVIDIA Imaginary 9000",
        ),
        (H100, "float32", "no peak is known for float32"),
    ],
    ids=["cpu", "unknown", "float32"],
)
def test_without_a_known_peak_there_is_no_mfu_but_a_reason(facts, precision, reason):
    card, basis = card_of(facts)
    found = with_efficiency(throughput_result("phase1", [0.02], (64,)), CONFIG, card, basis, precision)
    (m,) = found.measurements
    assert (m.mfu, m.bandwidth_utilization, found.peak_basis) == (None, None, reason)
    assert m.achieved_flops_per_second > 0 and m.optimizer_bytes_per_second > 0


def test_a_model_whose_flops_cannot_be_counted_keeps_its_times_and_says_why(monkeypatch):
    def fails(*args):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(efficiency, "step_flops", fails)
    result = throughput_result("phase1", [0.02], (64,))
    found = with_efficiency(result, CONFIG, *card_of(H100), "float16")
    assert found.measurements[0].model_flops is None and found.measurements[0].total_time_ms == 20
    assert found.warnings == ["FLOPs not counted: NotImplementedError: no such operator"]


def test_failed_lengths_have_no_efficiency():
    result = throughput_result("phase1", [0.02], (64,))
    failed = result.measurements[0].model_copy(update={"status": "oom", "total_time_ms": None, "detail": "out of memory"})
    found = with_efficiency(result.model_copy(update={"measurements": [failed]}), CONFIG, *card_of(H100), "float16")
    assert found.measurements == [failed]
