"""`phase1 memory` with --vram-limit, --card and --fit: what it accepts, checks, records and prints."""

import re

import pytest
import torch

from phase1.checks.memory import memory_checks
from phase1.cli import main as phase1
from phase1.commands import memory
from phase1.machine.cards import CARDS
from phase1.machine.isolate import Outcome
from phase1.measure.memory.measured import as_result
from phase1.records.schema import Fit, MemoryResult, read_report
from phase1.runs import MemoryRun
from phase1.tables import build_tables
from phase1.tables.console import memory_text
from phase1.tables.memory import fit_comparison
from tests.reports import memory_report

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the estimate")
SIZES = {
    "vocab_size": 500, "d_model": 16, "n_layers": 1, "n_heads": 2, "ar_ssm_max_rank": 4, "ar_ssm_min_rank": 2,
    "ar_ssm_window": 8, "htt_rank": 2, "htt_dense_rows": 16, "htt_groups": 16, "batch_size": 2, "seq_length": 64,
}  # fmt: skip
FLAGS = [part for name, value in SIZES.items() for part in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(autouse=True)
def as_users_run_it():
    torch.use_deterministic_algorithms(False)


def report(tmp_path):
    return read_report(tmp_path / "phase1_memory_validation.json", "memory")


def by_name(checks):
    return {check.name: check for check in checks}


@needs_no_gpu
def test_fit_writes_and_prints_the_largest_sizes_of_every_model(tmp_path, capsys):
    code = phase1(["memory", *FLAGS, "--vram-limit", "540MB", "--fit", "--verbose", "--out-dir", str(tmp_path)])
    written = report(tmp_path)
    assert code == memory.exit_code(written.checks)
    assert written.run["vram_limit_bytes"] == 540_000_000 and written.run["fit"] is True
    for result in written.results.values():
        assert [found.searched for found in result.fit] == ["batch_size", "seq_length"]
        for found in result.fit:
            assert (found.status, found.basis, found.limit_bytes) == ("ok", "estimated", 540_000_000)
            tried = {getattr(probe, found.searched): probe for probe in found.probes}
            best = getattr(found, found.searched)
            assert (tried[best].status, tried[best + found.step].status) == ("ok", "oom")
    sizes = {role: [found.batch_size * found.seq_length for found in result.fit] for role, result in written.results.items()}
    assert sizes["baseline"][0] < sizes["baseline_optimized"][0]
    checks = by_name(written.checks)
    assert checks["one_sequence_trains"].value == written.results["phase1"].fit[0].batch_size
    assert checks["fits_vram_limit"].limit == 540_000_000 and checks["fits_vram_limit"].status == "pass"
    out = capsys.readouterr().out
    assert "Largest sizes that train: 0.54 GB of the card" in out and "(estimated)" in out
    assert f"{sizes['baseline'][0] // 64:,}" in out


@needs_no_gpu
def test_a_card_adds_its_check_and_its_limit(tmp_path, capsys):
    code = phase1(["memory", *FLAGS, "--card", "RTX 4060 Ti 16GB", "--no-baseline", "--verbose", "--out-dir", str(tmp_path)])
    assert code == 3  # no baseline, no reduction
    check = by_name(report(tmp_path).checks)["fits_rtx4060ti_16gb"]
    assert (check.limit, check.status) == (14.4e9, "pass") and check.detail.startswith("estimated: ")
    assert all(result.fit == [] for result in report(tmp_path).results.values())
    assert "Fits rtx4060ti_16gb" in capsys.readouterr().out


@needs_no_gpu
def test_a_model_over_the_limit_is_oom_and_fails_only_the_limits_that_were_there_to_use(tmp_path):
    code = phase1(["memory", *FLAGS, "--vram-limit", "500MB", "--out-dir", str(tmp_path)])
    assert code == 1
    assert {result.status for result in report(tmp_path).results.values()} == {"oom"}
    checks = by_name(report(tmp_path).checks)
    assert checks["fits_vram_limit"].status == "fail" and checks["fits_8gb"].status == "pass"
    assert checks["fits_vram_limit"].value > 500_000_000, "its need is known"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vram-limit", "8 apples"], "--vram-limit must be a size such as 8GB"),
        (["--card", "voodoo2"], "--card must be one of the known cards; got 'voodoo2'"),
        (["--card", "rtx4060", "--vram-limit", "8GB"], "give one of the two"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_2_before_anything_is_measured(flags, message, tmp_path, capsys):
    assert phase1(["memory", *FLAGS, *flags, "--out-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


@needs_no_gpu
def test_fit_without_a_gpu_needs_the_size_of_one(tmp_path, capsys):
    assert phase1(["memory", *FLAGS, "--fit", "--out-dir", str(tmp_path)]) == 2
    assert "--fit needs a GPU or the size of one; got neither; give --card rtx4060" in capsys.readouterr().err


def test_on_a_gpu_a_limit_larger_than_the_card_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "total_gpu_bytes", lambda: 8 * 10**9)
    assert memory.limit_of(MemoryRun(card="rtx4060")) == 7_200_000_000
    with pytest.raises(ValueError, match="at most the 8.00 GB of this card; got 9.00 GB"):
        memory.limit_of(MemoryRun(card="rtx3080"))
    assert memory.limit_of(MemoryRun(fit=True)) is None


def engine(status="ok", fits=(), basis="emulated", **fields) -> MemoryResult:
    common = {"model_name": "m", "config": {}, "config_id": "0", "status": status, "basis": basis, "detail": "why"}
    parameters = {"total": 1, "embedding": 1, "mixer": 0, "mlp": 0}
    sizes = {"peak_allocated_bytes": 1, "peak_reserved_bytes": 1, "outside_allocator_bytes": 1} if status == "ok" else {}
    return MemoryResult.model_validate(common | {"parameters": parameters, "fit": list(fits)} | sizes | fields)


def found(status, **fields) -> Fit:
    return Fit(**({
        "searched": "batch_size", "status": status, "step": 1, "bound": 512, "limit_bytes": 7_200_000_000, "basis": "emulated",
        "probes": [], "detail": "" if status == "ok" else "why",
    } | fields))  # fmt: skip


@pytest.mark.parametrize("status, verdict, value", [("ok", "pass", 7), ("oom", "fail", 0), ("error", "inconclusive", None)])
def test_one_sequence_trains_is_decided_by_the_search(status, verdict, value):
    sizes = {"batch_size": 7, "seq_length": 64} if status == "ok" else {}
    checks = by_name(memory_checks({"phase1": engine(fits=[found(status, **sizes)])}, None, 7_200_000_000))
    assert (checks["one_sequence_trains"].status, checks["one_sequence_trains"].value) == (verdict, value)
    assert checks["one_sequence_trains"].detail.startswith("emulated: ")


def test_every_verdict_on_a_capped_card_says_emulated():
    checks = memory_checks(
        {"baseline": engine(), "phase1": engine(memory_reduction_percent=60.0)}, 80 * 10**9, 7_200_000_000, CARDS["rtx4060"]
    )
    assert [check.name for check in checks] == ["fits_rtx4060", "reduction_50_percent"]
    assert all(check.detail.startswith("emulated: ") for check in checks)
    over = by_name(memory_checks({"phase1": engine("oom")}, 80 * 10**9, 7_200_000_000, CARDS["rtx4060"]))
    assert over["fits_rtx4060"].status == "fail"
    assert over["fits_rtx4060"].detail == "emulated: out of memory with 7.20 GB of the card to use"


def test_the_limit_reaches_every_model(monkeypatch, tmp_path):
    seen = []

    def record(role, case):
        seen.append(case.vram_limit_bytes)
        return as_result(role, case, Outcome("error", message="not run"), "estimated")

    monkeypatch.setattr(memory, "memory_result", record)
    memory.main(MemoryRun(**SIZES, card="rtx3080", out_dir=str(tmp_path)))
    assert seen == [9_000_000_000] * 4


def test_the_table_of_sizes_marks_bounds_and_failures_and_is_there_only_where_asked_for():
    length = {"searched": "seq_length", "step": 64, "bound": 2**20}
    results = {
        "baseline": engine(fits=[found("oom", detail="not even 1 fits"), found("error", **length, detail="boom")]),
        "phase1": engine(
            fits=[found("ok", batch_size=512, seq_length=2048), found("ok", **length, batch_size=1, seq_length=77_632)]
        ),
    }
    with_fits = memory_report(results=results, checks=[], run={"batch_size": 4, "seq_length": 2048})
    table = fit_comparison(with_fits)
    assert [row[:5] for row in table.rows] == [
        ("baseline", "emulated", "OOM", "FAIL", 0), ("phase1", "emulated", ">= 512", 77_632, 0),
    ]  # fmt: skip
    assert "7.20 GB of the card" in table.caption and "(emulated)" in table.caption
    assert "baseline: OOM, not even 1 fits" in table.notes and "baseline: FAIL, boom" in table.notes
    assert re.search(r"77,632", memory_text(with_fits))
    assert "fit_comparison" in [one.name for one in build_tables({"memory": with_fits})]
    assert fit_comparison(memory_report()) is None
    assert "fit_comparison" not in [one.name for one in build_tables({"memory": memory_report()})]


@pytest.mark.parametrize("basis", ["estimated", "measured"])
def test_of_short_pieces_a_gpu_searches_the_batch_alone(basis, monkeypatch, tmp_path, capsys):
    asked, measured = {}, memory.memory_result

    def found(case, known, card_bytes, on_probe, lengths=True):
        asked[known.model_name] = lengths
        common = {"basis": "estimated", "limit_bytes": 540_000_000, "status": "ok", "probes": []}
        fits = [Fit(searched="batch_size", step=1, bound=9, batch_size=7, seq_length=512, **common)]
        return fits + [Fit(searched="seq_length", step=64, bound=999, batch_size=1, seq_length=640, **common)] * lengths

    monkeypatch.setattr(memory, "fit_sizes", found)
    monkeypatch.setattr(memory, "memory_result", lambda *a: measured(*a).model_copy(update={"basis": basis}))
    sizes = ["512" if word == "64" else word for word in FLAGS]
    phase1(["memory", *sizes, "--vram-limit", "540MB", "--fit", "--out-dir", str(tmp_path)])
    short = asked.pop("phase1_pieces")
    assert short is (basis == "estimated") and asked and all(asked.values())
    lines = {line[:24].strip() or "head": line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("files")}
    assert lines["engine, in pieces"].split()[-2:] == (["7", "640"] if short else ["%", "7"])
    assert lines["engine"].split()[-2:] == ["7", "640"]
    assert any(line.split()[-2:] == ["batch", "longest"] for line in lines.values()) and max(map(len, lines.values())) <= 110
    rows = {row[0]: row[2:4] for row in fit_comparison(report(tmp_path)).rows}
    assert rows["phase1_pieces"] == (7, 640 if short else None) and rows["phase1"] == (7, 640)
