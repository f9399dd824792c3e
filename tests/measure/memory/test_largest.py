"""The largest sizes that train: found by estimates here, by processes of their own on a GPU, and no probe knows another."""

import time
from dataclasses import replace

import pytest
import torch

from phase1.machine.isolate import Outcome, run_isolated
from phase1.measure.memory import largest as fit
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.measure.memory.largest import LENGTH_STEP, fit_sizes, probe_size, train_briefly
from phase1.measure.memory.limit import basis
from phase1.measure.memory.measured import as_result, memory_result
from phase1.measure.memory.search import Probe
from phase1.roster import model_config
from phase1.runs import MemoryRun

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the estimate")
SHAPE = MemoryRun(
    vocab_size=500, d_model=16, n_layers=1, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=8,
    htt_rank=2, htt_dense_rows=16, htt_groups=16,
)  # fmt: skip
LIMIT = 540_000_000  # 40 MB beside the context that an estimate assumes, 17 of them workspaces


@pytest.fixture(autouse=True)
def as_users_run_it():
    torch.use_deterministic_algorithms(False)


def case(role="baseline", batch_size=4, seq_length=128, limit=LIMIT) -> MemoryCase:
    return MemoryCase(model_config(role, SHAPE), batch_size, seq_length, limit)


def needed(one: MemoryCase) -> int:
    return estimate_memory(one).needed_bytes


@needs_no_gpu
@pytest.mark.parametrize(
    "role", ["baseline", "baseline_optimized"]
)  # the engine's estimates take longer: tests/commands/test_fit.py
def test_what_is_found_fits_and_one_step_more_does_not(role):
    one, ticks = case(role), []
    batch, length = fit_sizes(one, memory_result(role, one), None, ticks.append)
    assert (batch.searched, batch.seq_length, batch.step) == ("batch_size", 128, 1)
    assert (length.searched, length.batch_size, length.step) == ("seq_length", 1, 64) and length.seq_length % 64 == 0
    for found in (batch, length):
        assert (found.status, found.basis, found.limit_bytes) == ("ok", "estimated", LIMIT)
        assert all((probe.needed_bytes <= LIMIT) == (probe.status == "ok") for probe in found.probes)
        tried = {getattr(probe, found.searched): probe for probe in found.probes}
        best = getattr(found, found.searched)
        assert tried[best].needed_bytes <= LIMIT < tried[best + found.step].needed_bytes
    assert tried[best].needed_bytes == needed(replace(one, batch_size=1, seq_length=best))
    # The size of the report itself costs no probe. Segments of 20 MB are steps in so little memory: more than the 6 of a line.
    assert len(ticks) == len(batch.probes) + len(length.probes) - 1 <= 16


def scripted(monkeypatch, probe) -> None:
    monkeypatch.setattr(fit, "probe_size", probe)


def search(one: MemoryCase, status="oom"):
    result = as_result("baseline", one, Outcome(status, message="why"), basis(one.vram_limit_bytes))
    return fit_sizes(one, result, None, lambda size: None)


def test_a_card_that_holds_everything_gives_the_bounds(monkeypatch):
    scripted(monkeypatch, lambda one: Probe("ok", 1))
    batch, length = search(case(batch_size=1, seq_length=1024), status="error")
    assert batch.batch_size == batch.bound == fit.TOKENS_BOUND // 1024
    assert length.seq_length == length.bound == fit.TOKENS_BOUND
    batch, _ = search(case(batch_size=1, seq_length=64), status="error")
    assert batch.batch_size == batch.bound == fit.BATCH_BOUND


def test_a_card_that_holds_nothing_says_so(monkeypatch):
    scripted(monkeypatch, lambda one: Probe("oom", None, "no room"))
    for found, smallest in zip(search(case()), (1, LENGTH_STEP)):
        assert (found.status, found.batch_size, found.seq_length) == ("oom", None, None)
        assert found.detail == f"not even {smallest} fits: no room"


def test_a_probe_that_crashes_ends_its_search_with_the_reason_and_not_the_other(monkeypatch):
    scripted(monkeypatch, lambda one: Probe("error", None, "boom") if one.batch_size == 2 else Probe("ok", 1))
    batch, length = search(case())
    assert (batch.status, batch.detail, batch.batch_size) == ("error", "boom", None)
    assert length.status == "ok"


def test_a_size_beyond_the_bounds_is_searched_below_them(monkeypatch):
    scripted(monkeypatch, lambda one: Probe("ok" if one.batch_size * one.seq_length <= 1000 else "oom"))
    batch, length = search(case(batch_size=10_000, seq_length=2**21))
    assert batch.status == "oom" and batch.bound == 1
    assert length.seq_length == 960


@needs_no_gpu
def test_a_probe_gives_the_same_answer_whatever_was_probed_before():
    small, huge = case(batch_size=2), case(batch_size=4096)
    alone = probe_size(small)
    after = [probe_size(huge), probe_size(small)]
    assert after[0].status == "oom" and alone.status == "ok"
    assert after[1] == alone


@needs_no_gpu
def test_a_probe_that_needs_more_than_the_limit_tells_how_much():
    over = probe_size(case(batch_size=4096))
    assert (
        over.status == "oom" and over.needed_bytes == needed(case(batch_size=4096)) and "of a limit of 0.54 GB" in over.detail
    )


def in_use() -> int:
    """Bytes in use on the card when a fresh process has its context: what a probe starts from."""
    outcome = run_isolated(torch.cuda.mem_get_info)
    assert outcome.status == "ok", outcome.message
    free, total = outcome.value
    return total - free


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_baseline_after_an_oom_probe_is_that_before_it():
    full = MemoryCase(model_config("baseline", MemoryRun()), 4, 2048, 3 * 10**9)
    before = in_use()
    probe = probe_size(full)
    assert probe.status == "oom", probe.detail
    for _ in range(20):  # the driver may take a moment to clear a dead process's memory
        after = in_use()
        if abs(after - before) <= 2**20:
            break
        time.sleep(0.1)
    assert abs(after - before) <= 2**20


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_probe_gives_the_same_answer_after_an_oom_one():
    small = MemoryCase(model_config("phase1", MemoryRun()), 1, 512, 6 * 10**9)
    first = probe_size(small)
    assert probe_size(replace(small, batch_size=4096, seq_length=2048)).status == "oom"
    again = probe_size(small)
    assert first.status == again.status == "ok"
    assert abs(first.needed_bytes - again.needed_bytes) <= 2**20


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_largest_batch_trains_and_one_more_does_not():
    one = MemoryCase(model_config("baseline", MemoryRun()), 1, 1024, 4 * 10**9)
    batch, length = fit_sizes(one, memory_result("baseline", one), None, lambda size: None)
    assert (batch.status, batch.basis) == ("ok", "emulated"), batch.detail
    assert run_isolated(train_briefly, replace(one, batch_size=batch.batch_size)).status == "ok"
    assert run_isolated(train_briefly, replace(one, batch_size=batch.batch_size + 2)).status == "oom"
    assert length.status == "ok" and length.seq_length > 1024
