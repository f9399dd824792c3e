"""A limit is read as written, and a run is held to it."""

from dataclasses import replace

import pytest
import torch

from phase1.machine.isolate import Outcome, run_isolated
from phase1.measure.memory import limit
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.measure.memory.largest import train_briefly
from phase1.measure.memory.limit import basis, cap_memory, check_limit, limit_bytes, parse_bytes, within_limit
from phase1.measure.memory.measured import measure_memory, memory_result
from phase1.roster import model_config
from phase1.runs import MemoryRun

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the estimate")
SHAPE = MemoryRun(
    vocab_size=3000, d_model=64, n_layers=2, n_heads=2, ar_ssm_max_rank=8, ar_ssm_window=16,
    htt_rank=4, htt_dense_rows=256, htt_groups=64,
)  # fmt: skip
CASE = MemoryCase(model_config("baseline", SHAPE), 2, 128)


@pytest.fixture(autouse=True)
def as_users_run_it():
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "text, size",
    [
        ("8GB", 8 * 10**9), ("7.2GB", 7_200_000_000), ("7.2 gb", 7_200_000_000), ("8GiB", 8 * 2**30), ("0.5GiB", 2**29),
        ("7200000000", 7_200_000_000), ("600MB", 600_000_000), ("600 MiB", 600 * 2**20), ("1TB", 10**12), (" 8000kb ", 8 * 10**6),
        ("8G", 8 * 10**9), ("7.2 g", 7_200_000_000), ("512M", 512 * 10**6), ("1000000B", 10**6), ("1MB", 10**6),
    ],
)  # fmt: skip
def test_a_size_is_read_with_its_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "8 Gi", "-8GB", "8,5GB", "0", "0GB", "1e9", "nan", "inf", "8GBs", "8 8GB", "0.1B"]
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(
        ValueError, match=r"^--vram-limit must be a size such as 8GB \(decimal\), 8GiB or 7200000000 \(bytes\); got '"
    ):
        parse_bytes(text)


@pytest.mark.parametrize("text, meant", [("8", "8GB"), ("7.2", "7.2GB"), ("8kb", "8GB"), ("12B", "8GB"), ("999999", "8GB")])
def test_a_limit_without_its_unit_is_refused(text, meant):
    with pytest.raises(ValueError, match=rf"^--vram-limit must be at least 1MB; got '{text}', [\d,]+ bytes; did you mean {meant}\?$"):
        parse_bytes(text)


def test_a_card_is_a_limit_and_the_two_exclude_each_other():
    assert limit_bytes(None, None) is None
    assert limit_bytes("7.2GB", None) == limit_bytes(None, "rtx4060") == 7_200_000_000
    with pytest.raises(ValueError, match="--card rtx4060 sets the limit .*; give one of the two"):
        limit_bytes("8GB", "rtx4060")


def test_a_limit_larger_than_the_card_is_refused():
    check_limit(8 * 10**9, 8 * 10**9)
    check_limit(8 * 10**9, None)
    check_limit(None, 10**9)
    with pytest.raises(ValueError, match="at most the 8.00 GB of this card; got 8.10 GB; a larger card cannot be emulated"):
        check_limit(8_100_000_000, 8 * 10**9)


class FakeCard:
    """Stands in for torch.cuda: a context and libraries of 400 MB appear with the first step, and 100 MB are cached by it."""

    total, loaded, cached, fraction, calls = 10 * 10**9, 0, 0, None, ()

    def install(self, monkeypatch):
        for name, function in {
            "mem_get_info": lambda: (self.total - self.loaded - self.cached, self.total),
            "memory_reserved": lambda: self.cached,
            "empty_cache": lambda: setattr(self, "cached", 0),
            "set_per_process_memory_fraction": lambda fraction: setattr(self, "fraction", fraction),
            "reset_peak_memory_stats": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(limit, "make_workload", lambda model, device: None)
        monkeypatch.setattr(limit, "random_batch", lambda *args: args)
        monkeypatch.setattr(limit, "train_step", self.step)
        return self

    def step(self, state, batches):
        assert self.fraction is None, "the libraries are loaded before the cap is set"
        self.loaded, self.cached, self.calls = 400_000_000, 100_000_000, (*self.calls, batches)


def test_the_allocator_gets_what_the_limit_leaves_beside_context_and_libraries(monkeypatch):
    card = FakeCard().install(monkeypatch)
    cap_memory(CASE.model, 7_200_000_000)
    assert card.fraction == pytest.approx((7.2e9 - 0.4e9) / 10e9, rel=1e-12)
    assert card.calls == ([(3000, 1, 64, "cuda")],) and card.cached == 0


@pytest.mark.parametrize("measure", [measure_memory, train_briefly])
def test_what_runs_on_the_gpu_caps_itself_before_anything_else(measure, monkeypatch):
    class Capped(Exception):
        pass

    def cap(model, size):
        raise Capped(model, size)

    monkeypatch.setitem(measure.__globals__, "cap_memory", cap)
    with pytest.raises(Capped) as caught:
        measure(replace(CASE, vram_limit_bytes=7))
    assert caught.value.args == (CASE.model, 7)


def test_without_a_limit_nothing_is_capped_and_no_step_is_spent(monkeypatch):
    card = FakeCard().install(monkeypatch)
    cap_memory(CASE.model, None)
    assert card.fraction is None and card.calls == ()


def test_a_limit_below_what_the_libraries_take_is_out_of_memory_and_one_above_the_card_is_an_error(monkeypatch):
    FakeCard().install(monkeypatch)
    with pytest.raises(MemoryError, match="0.40 GB outside the allocator, of a limit of 0.30 GB"):
        cap_memory(CASE.model, 300_000_000)
    with pytest.raises(ValueError, match="at most the 10.00 GB of this card"):
        cap_memory(CASE.model, 11 * 10**9)


def test_what_needs_more_than_the_limit_is_out_of_memory_whatever_it_ended_with():
    fits = Outcome("ok", 5)
    assert within_limit(fits, 100, None, "estimated") is within_limit(fits, 100, 100, "estimated") is fits
    over = within_limit(fits, 7_300_000_000, 7_200_000_000, basis(1))
    assert over.status == "oom" and over.value == 5, "what it would have needed stays known"
    assert (
        over.message
        == f"out of memory: a step needs 7.30 GB ({basis(1)}) with what is outside the allocator, of a limit of 7.20 GB"
    )
    failed = Outcome("error", message="boom")
    assert within_limit(failed, None, 1, "estimated") is failed


@needs_no_gpu
def test_without_a_gpu_an_estimate_over_the_limit_is_out_of_memory_and_estimated():
    needed = estimate_memory(CASE).needed_bytes
    fits, over = (memory_result("baseline", replace(CASE, vram_limit_bytes=limit)) for limit in (needed, needed - 1))
    assert (fits.status, fits.basis) == ("ok", "estimated")
    assert (over.status, over.basis, over.peak_allocated_bytes) == ("oom", "estimated", fits.peak_allocated_bytes)
    assert "(estimated)" in over.detail and "of a limit of 0.5" in over.detail and "try --batch-size 1" in over.detail


def test_a_capped_gpu_is_emulated_and_a_whole_one_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (basis(None), basis(10**9)) == ("measured", "emulated")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (basis(None), basis(10**9)) == ("estimated", "estimated")


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_allocator_fails_beyond_the_cap_and_serves_below_it():
    large = MemoryCase(model_config("baseline", MemoryRun()), 2, 1024)
    below = run_isolated(train_briefly, replace(large, vram_limit_bytes=9 * 10**9))
    assert below.status == "ok", below.message
    assert below.value <= 9 * 10**9
    assert run_isolated(train_briefly, replace(large, vram_limit_bytes=2 * 10**9)).status == "oom"


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_case_over_its_limit_is_oom_and_emulated():
    large = MemoryCase(model_config("baseline", MemoryRun()), 2, 1024)
    capped = memory_result("baseline", replace(large, vram_limit_bytes=2 * 10**9))
    assert (capped.status, capped.basis) == ("oom", "emulated"), capped.detail
    free = memory_result("baseline", replace(large, vram_limit_bytes=9 * 10**9))
    assert (free.status, free.basis) == ("ok", "emulated"), free.detail
    assert free.peak_reserved_bytes + free.outside_allocator_bytes <= 9 * 10**9
