from dataclasses import replace

import pytest
import torch

from phase1.config import ROLES, MemoryRun, model_config
from phase1.measure import memory
from phase1.measure.isolate import Outcome
from phase1.measure.memory import MemoryCase, as_result, estimate_memory, measure_memory, memory_result, sizes_to_try
from phase1.measure.tracker import PARTS
from phase1.measure.workload import make_workload, random_batch
from phase1.train import train_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

V = 3000
SHAPE = MemoryRun(
    vocab_size=V, d_model=64, n_layers=2, n_heads=2, ar_ssm_max_rank=8, ar_ssm_window=16,
    htt_rank=4, htt_dense_rows=256, htt_groups=64,
)  # fmt: skip
MODELS = {role: model_config(role, SHAPE) for role in ROLES}


def case(role: str, batch_size: int = 2, seq_length: int = 128, **overrides) -> MemoryCase:
    return MemoryCase(replace(MODELS[role], **overrides), batch_size, seq_length)


def peak(*args, **overrides) -> int:
    return estimate_memory(case(*args, **overrides)).peak_allocated_bytes


@pytest.fixture(autouse=True)
def as_users_run_it():
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("role", MODELS)
def test_the_breakdown_sums_to_the_peak_which_is_that_of_the_highest_phase(role):
    peaks = estimate_memory(case(role))
    assert set(peaks.breakdown) == {*PARTS, "unattributed"}
    assert sum(peaks.breakdown.values()) == peaks.peak_allocated_bytes == max(peaks.phase_bytes.values())
    assert peaks.breakdown["unattributed"] == 0 and min(peaks.breakdown.values()) >= 0
    assert peaks.measured == "estimated"
    assert peaks.peak_allocated_bytes <= peaks.peak_reserved_bytes <= peaks.peak_allocated_bytes + 2**21


@pytest.mark.parametrize("role", MODELS)
def test_parameters_and_optimizer_state_take_the_bytes_of_float32_adamw(role):
    peaks = estimate_memory(case(role))
    tensors = list(make_workload(MODELS[role], "cpu").model.parameters())
    rounded = sum(-(-tensor.numel() * 4 // 512) * 512 for tensor in tensors)
    assert peaks.parameters["total"] == sum(tensor.numel() for tensor in tensors)
    assert peaks.breakdown["parameters"] == rounded
    assert peaks.breakdown["optimizer_state"] == 2 * rounded + 512 * len(tensors)  # two moments and a step count each


def test_the_transformers_logits_are_three_float32_matrices_at_the_peak():
    tokens = 4 * 256
    peaks = estimate_memory(case("baseline", 4, 256))
    assert peaks.breakdown["logits_loss"] == 3 * tokens * V * 4  # log-probabilities, their gradient, that of the logits


def test_no_matrix_of_positions_by_positions_is_counted():
    short, long = (estimate_memory(case("baseline", 1, T)).phase_bytes["forward"] for T in (1024, 2048))
    # every tensor of the step grows in proportion to T; one T x T matrix of half precision per head would add 17 MB
    assert long - short < 1.02 * (short - estimate_memory(case("baseline", 1, 1)).phase_bytes["forward"])


@pytest.mark.parametrize("role", MODELS)
def test_a_larger_batch_and_a_longer_sequence_take_more(role):
    assert peak(role, 2, 128) < peak(role, 4, 128) < peak(role, 4, 512)


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_checkpointing_and_the_chunked_loss_each_take_less(role):
    for other in ({"loss": "materialized"}, {"checkpointing": False}):
        plain = {"loss": "chunked", "checkpointing": True} | other
        assert peak(role, 4, 512, loss="chunked", checkpointing=True) < peak(role, 4, 512, **plain)


def test_the_estimate_leaves_nothing_behind_and_can_be_repeated():
    assert estimate_memory(case("phase1")) == estimate_memory(case("phase1"))
    assert type(torch.zeros(1)) is torch.Tensor


def test_gradients_of_the_estimate_are_float32_and_all_there_when_the_optimizer_steps():
    peaks = estimate_memory(case("baseline", 4, 256))
    parameters, state = peaks.breakdown["parameters"], peaks.breakdown["optimizer_state"]
    assert 0 <= peaks.phase_bytes["optimizer"] - (parameters + state + parameters) < 64 * 1024


def test_without_a_gpu_a_result_is_labelled_estimated():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = memory_result("phase1", case("phase1"))
    assert (result.status, result.measured) == ("ok", "estimated")
    assert result.model_name == "phase1" and result.config_id == MODELS["phase1"].config_id
    assert result.parameters.total == estimate_memory(case("phase1")).parameters["total"]
    assert result.peak_allocated_bytes == peak("phase1")


def test_out_of_memory_is_recorded_with_the_sizes_to_try_next():
    result = as_result("baseline", case("baseline", 4, 2048), Outcome("oom", message="CUDA out of memory"), "measured")
    assert result.status == "oom" and result.peak_allocated_bytes is None
    assert result.detail == (
        "CUDA out of memory; try --batch-size 2, then --seq-length 1024, "
        "then gradient checkpointing (leave out --no-gradient-checkpointing)"
    )


def test_the_ladder_leaves_out_the_steps_that_are_taken():
    assert sizes_to_try(case("phase1", 1, 64)) == "try --seq-length 32"
    assert sizes_to_try(case("phase1", 1, 1)) == "try a smaller --d-model or --n-layers"


def test_a_failure_is_recorded_with_its_message():
    result = as_result("phase1", case("phase1"), Outcome("error", message="RuntimeError: boom"), "measured")
    assert (result.status, result.detail) == ("error", "RuntimeError: boom")


class FakeAllocator:
    """Stands in for torch.cuda: every phase of a step has a scripted peak."""

    def __init__(self, peaks: list[int]) -> None:
        self.peaks, self.resets, self.current = peaks, 0, 0

    def install(self, monkeypatch) -> None:
        for name, function in {
            "max_memory_allocated": lambda: self.current,
            "max_memory_reserved": lambda: self.current + 5,
            "reset_peak_memory_stats": self.reset,
            "memory_reserved": lambda: 1000,
            "mem_get_info": lambda: (3000, 10_000),
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def reset(self) -> None:
        self.current = self.peaks[self.resets % len(self.peaks)]
        self.resets += 1


def test_peaks_on_the_gpu_are_read_at_the_end_of_each_phase_and_reset_between(monkeypatch):
    fake = FakeAllocator([20_000_000, 30_000_000, 10_000_000, 7])  # forward, backward, optimizer, between steps
    fake.install(monkeypatch)
    monkeypatch.setattr(memory, "make_workload", lambda model, device: make_workload(model, "cpu"))
    monkeypatch.setattr(memory, "_batch", lambda case, device: random_batch(V, case.batch_size, case.seq_length, "cpu"))
    peaks = measure_memory(case("phase1", 1, 16))
    assert fake.resets == 4 * memory.MEASURED_STEPS
    assert peaks.phase_bytes == {"forward": 20_000_000, "backward": 30_000_000, "optimizer": 10_000_000}
    assert peaks.peak_allocated_bytes == 30_000_000 and peaks.peak_reserved_bytes == 30_000_005
    assert peaks.outside_allocator_bytes == 10_000 - 3000 - 1000
    assert sum(peaks.breakdown.values()) == 30_000_000


def test_what_is_tracked_is_the_step_that_training_takes(monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "train_step", lambda *args, **kwargs: seen.append(args) or train_step(*args, **kwargs))
    estimate_memory(case("phase1", 1, 16))
    [(state, _, _)] = seen
    assert state.dtype == torch.float16 and state.scaler.is_enabled()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("role", MODELS)
def test_on_a_gpu_the_breakdown_sums_to_the_measured_peak_and_the_estimate_is_close(role):
    large = MemoryCase(model_config(role, MemoryRun()), 2, 1024)
    torch.cuda.empty_cache()
    result = memory_result(role, large)
    assert result.status == "ok", result.detail
    assert result.measured == "measured"
    assert sum(result.breakdown.values()) == result.peak_allocated_bytes
    slack = 0.05 * result.peak_allocated_bytes + 80e6  # cuBLAS workspaces are up to 70 MB, whatever the size of the model
    assert abs(result.breakdown["unattributed"]) < slack
    assert result.peak_allocated_bytes <= result.peak_reserved_bytes
    assert 100e6 < result.outside_allocator_bytes < 5e9  # what this process, and the test's own, hold on the card
    assert estimate_memory(large).peak_allocated_bytes == pytest.approx(result.peak_allocated_bytes, abs=slack)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_case_that_does_not_fit_is_oom_and_the_next_one_is_measured():
    huge = MemoryCase(model_config("baseline", MemoryRun()), 4096, 4096)
    result = memory_result("baseline", huge)
    assert result.status == "oom" and "--batch-size 2048" in result.detail
    assert memory_result("phase1", case("phase1")).status == "ok"
