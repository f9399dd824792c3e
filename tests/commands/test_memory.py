import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from phase1.checks.memory import memory_checks, with_reductions
from phase1.cli import parse
from phase1.commands import memory
from phase1.machine.isolate import Outcome
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.measure.memory.measured import as_result
from phase1.records import session
from phase1.records.schema import MemoryResult, read_report
from phase1.runs import MemoryRun

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the estimate")
SIZES = {
    "vocab_size": 3000, "d_model": 64, "n_layers": 2, "n_heads": 2, "htt_dense_rows": 256, "htt_groups": 64, "htt_rank": 4,
    "ar_ssm_max_rank": 8, "ar_ssm_window": 16, "batch_size": 2, "seq_length": 256,
}  # fmt: skip


def run(tmp_path, **overrides) -> MemoryRun:
    return MemoryRun(**(SIZES | {"out_dir": str(tmp_path)} | overrides))


def result(**fields) -> MemoryResult:
    common = {"model_name": "m", "config": {}, "config_id": "0", "status": "ok", "basis": "measured", "detail": "why"}
    parameters = {"total": 1, "embedding": 1, "mixer": 0, "mlp": 0}
    return MemoryResult.model_validate(common | {"parameters": parameters, "outside_allocator_bytes": 0} | fields)


def peaks(allocated: int, **fields) -> MemoryResult:
    return result(peak_allocated_bytes=allocated, peak_reserved_bytes=allocated, **fields)


def by_name(results, free_bytes=None):
    return {check.name: check for check in memory_checks(with_reductions(results), free_bytes)}


@needs_no_gpu
def test_without_a_gpu_it_writes_estimates_for_engine_and_transformers(tmp_path, capsys):
    code = memory.main(run(tmp_path, seq_length=1024, verbose=True))
    report = read_report(tmp_path / "phase1_memory_validation.json", "memory")
    assert list(report.results) == ["baseline", "baseline_optimized", "baseline_fast", "phase1", "phase1_pieces"]
    whole, pieces = (report.results[role] for role in ("phase1", "phase1_pieces"))
    assert pieces.config_id == whole.config_id and pieces.peak_allocated_bytes < whole.peak_allocated_bytes
    for role, one in report.results.items():
        assert (one.model_name, one.status, one.basis) == (role, "ok", "estimated")
        assert sum(one.breakdown.values()) == one.peak_allocated_bytes
        assert one.peak_allocated_bytes == max(one.peak_forward_bytes, one.peak_backward_bytes, one.peak_optimizer_bytes)
    base, engine = report.results["baseline"], report.results["phase1"]
    assert engine.memory_reduction_percent == pytest.approx(100 * (1 - engine.peak_allocated_bytes / base.peak_allocated_bytes))
    assert base.memory_reduction_percent is None
    assert report.run["batch_size"] == 2 and report.run["seq_length"] == 1024
    assert [check.name for check in report.checks] == ["fits_8gb", "fits_10gb", "reduction_50_percent"]
    assert all(check.detail.startswith("estimated") for check in report.checks)
    assert code == (0 if all(check.status == "pass" for check in report.checks) else 1)
    out = capsys.readouterr().out
    assert "estimated" in out and "files " in out and "phase1_pieces: phase1 in pieces of 256 tokens." in out
    assert (tmp_path / memory.PLOT).stat().st_size > 1000 and (tmp_path / memory.TIMELINE_PLOT).stat().st_size > 1000
    assert report.ablation == []


@needs_no_gpu
def test_no_baseline_leaves_both_out_and_the_reduction_undecided(tmp_path):
    assert memory.main(run(tmp_path, baseline=False)) == 3
    report = read_report(tmp_path / "phase1_memory_validation.json", "memory")
    assert list(report.results) == ["phase1"]
    assert report.checks[2].status == "inconclusive" and "--no-baseline" in report.checks[2].detail


def test_a_dry_run_measures_nothing_where_there_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chip = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(session, "environment", lambda: {"gpu": "a card"})
    memory.main(run(tmp_path, dry_run=True, baseline=False))
    assert read_report(tmp_path / "phase1_memory_validation.json", "memory").results["phase1"].basis == "estimated"


@needs_no_gpu
def test_ablate_writes_and_prints_one_component_at_a_time(tmp_path, capsys):
    memory.main(run(tmp_path, ablate=True, verbose=True))
    rows = read_report(tmp_path / "phase1_memory_validation.json", "memory").ablation
    assert [(row.from_role, row.name) for row in rows] == [
        ("baseline", "with the engine's loss"),
        ("baseline", "with the engine's checkpointing"),
        ("baseline", "with the engine's mixer"),
        ("baseline", "with the engine's table"),
        ("baseline", "with the engine's copy head"),
        ("baseline", "without optimizer state"),
        ("phase1", "without the engine's loss"),
        ("phase1", "without the engine's checkpointing"),
        ("phase1", "without the engine's mixer"),
        ("phase1", "without the engine's table"),
        ("phase1", "without the engine's copy head"),
        ("phase1", "without optimizer state"),
    ]
    assert "with the engine's mixer" in capsys.readouterr().out


@needs_no_gpu
def test_an_interrupted_ablation_goes_on_with_the_model_it_was_at(tmp_path, monkeypatch):
    calls, whole = [], memory.memory_result

    def counted(role, case):
        calls.append((role, case.model.config_id))
        if len(calls) == 7:  # the four models, two rows, and in the third
            raise KeyboardInterrupt
        return whole(role, case)

    monkeypatch.setattr(memory, "memory_result", counted)
    with pytest.raises(KeyboardInterrupt):
        memory.main(run(tmp_path, ablate=True))
    memory.main(run(tmp_path, ablate=True, resume=True))
    assert len(calls) == 15 and len(set(calls)) == 14 and calls[6] == calls[7]
    resumed = read_report(tmp_path / "phase1_memory_validation.json", "memory").ablation
    monkeypatch.undo()
    memory.main(run(tmp_path, ablate=True))
    assert read_report(tmp_path / "phase1_memory_validation.json", "memory").ablation == resumed


def test_ablate_needs_the_baseline(tmp_path):
    with pytest.raises(ValueError, match="--no-baseline"):
        run(tmp_path, ablate=True, baseline=False)


def test_the_row_in_pieces_is_one_of_longer_sequences_and_of_runs_without_pieces_of_their_own(tmp_path):
    cases = memory.cases_of(longer := run(tmp_path, seq_length=300), memory.models(longer), None, None)
    assert {role: case.piece_length for role, case in cases.items() if case.piece_length} == {"phase1_pieces": 256}
    for other in ({}, {"seq_length": 300, "piece_length": 64}, {"seq_length": 300, "model": ("phase1=tests.test_factory:right",)}):
        assert "phase1_pieces" not in memory.models(run(tmp_path, **other))


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_recompute_is_of_the_engine_and_of_no_other(tmp_path, recompute):
    on, off = memory.models(run(tmp_path)), memory.models(run(tmp_path, recompute=recompute))
    assert (on["phase1"].recompute, off["phase1"].recompute) == ("block", recompute)
    assert on["baseline"] == off["baseline"] and on["baseline_optimized"] == off["baseline_optimized"]


@needs_no_gpu
def test_a_model_that_fails_is_recorded_and_the_others_are_kept(tmp_path, monkeypatch):
    def one_fails(role, case):
        outcome = Outcome("error", message="boom") if role == "phase1" else Outcome("ok", estimate_memory(case))
        return as_result(role, case, outcome, "estimated")

    monkeypatch.setattr(memory, "memory_result", one_fails)
    assert memory.main(run(tmp_path)) == 3
    report = read_report(tmp_path / "phase1_memory_validation.json", "memory")
    assert report.results["baseline"].status == "ok"
    assert (report.results["phase1"].status, report.results["phase1"].detail) == ("error", "boom")
    assert {check.status for check in report.checks} == {"inconclusive"}


def test_fits_counts_reserved_memory_and_what_is_outside_the_allocator():
    engine = result(peak_allocated_bytes=1, peak_reserved_bytes=7_000_000_000, outside_allocator_bytes=200_000_000)
    assert by_name({"phase1": engine})["fits_8gb"].status == "pass"
    engine = engine.model_copy(update={"outside_allocator_bytes": 200_000_001})
    checks = by_name({"phase1": engine})
    assert (checks["fits_8gb"].status, checks["fits_10gb"].status) == ("fail", "pass")
    assert (checks["fits_8gb"].value, checks["fits_8gb"].limit) == (7_200_000_001, 7.2e9)


@pytest.mark.parametrize("peak, status", [(49, "pass"), (50, "fail"), (120, "fail")])
def test_more_than_half_of_the_baseline_must_be_saved(peak, status):
    check = by_name({"baseline": peaks(100), "phase1": peaks(peak)})["reduction_50_percent"]
    assert (check.value, check.limit, check.status) == (pytest.approx(100 - peak), 50, status)


def test_no_reduction_is_stated_where_the_baseline_did_not_fit():
    check = by_name({"baseline": result(status="oom", detail="out of memory"), "phase1": peaks(1)})["reduction_50_percent"]
    assert (check.value, check.status) == (None, "inconclusive") and "oom" in check.detail


def test_an_engine_that_runs_out_of_memory_fails_only_the_cards_this_one_could_have_held():
    checks = by_name({"phase1": result(status="oom", detail="out of memory")}, free_bytes=8_000_000_000)
    assert (checks["fits_8gb"].status, checks["fits_10gb"].status) == ("fail", "inconclusive")
    assert by_name({"phase1": result(status="oom", detail="out of memory")})["fits_8gb"].status == "inconclusive"


@needs_no_gpu
def test_the_command_line_takes_its_flags_and_prints_nothing_but_the_report(tmp_path):
    flags = [part for name, value in SIZES.items() for part in ("--" + name.replace("_", "-"), str(value))]
    command = [sys.executable, "-m", "phase1", "memory", *flags, "--no-baseline", "--out-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""  # no progress bar where nobody watches, no warnings
    report = read_report(tmp_path / "phase1_memory_validation.json", "memory")
    assert report.command.startswith("phase1 memory --vocab-size 3000")


@needs_no_gpu
def test_pieces_are_in_the_report_and_on_the_screen_and_take_less(tmp_path, capsys):
    found = {}
    for length in (None, 256):
        memory.main(run(tmp_path, piece_length=length, seq_length=4096, copy_window=64))
        report = read_report(tmp_path / "phase1_memory_validation.json", "memory")
        found[length] = {role: result.peak_allocated_bytes for role, result in report.results.items()}
    assert report.run["piece_length"] == 256 and "engine in pieces of 256" in capsys.readouterr().out
    assert found[256].pop("phase1") < 0.6 * found[None].pop("phase1")
    assert found[256] == {role: peak for role, peak in found[None].items() if role != "phase1_pieces"}


@pytest.mark.parametrize("command", ["memory", "throughput"])
def test_the_last_screen_names_the_check_of_an_own_model_that_is_measured_as_it_is(command):
    module, report = import_module(f"phase1.commands.{command}"), SimpleNamespace(checks=[])
    own = "kda=examples.peers.mixers:kda"
    asked = [
        line for line in module.next_steps(parse(command, ["--model", own]), report) if line.startswith("phase1 check-model")
    ]
    assert len(asked) == 1 and asked[0].startswith(f"phase1 check-model {own} ")
    assert not any("check-model" in line for line in module.next_steps(parse(command, []), report))
