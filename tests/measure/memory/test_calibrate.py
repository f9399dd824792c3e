import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phase1.config import EngineShape
from phase1.machine.cards import Chip
from phase1.machine.isolate import Outcome
from phase1.measure.memory import calibrate as module
from phase1.measure.memory.calibrate import CalibrationRow, calibrate, calibration_cases, judge
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.roster import model_config

SMALL = MemoryCase(model_config("phase1", EngineShape(vocab_size=3000, d_model=32, n_layers=1, n_heads=2, htt_dense_rows=64)), 1, 16)
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "calibrate_memory.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("calibrate_memory", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def row(error, name="case"):
    return CalibrationRow(
        name, measured_bytes=100, estimated_bytes=100, error_percent=error, reserved_error_percent=9.0,
        measured_phase_bytes={"forward": 90, "backward": 100}, estimated_phase_bytes={"forward": 100, "backward": 80},
    )  # fmt: skip


def test_there_are_at_least_24_cases_of_every_kind_no_two_alike():
    cases = calibration_cases()
    assert len(cases) >= 24 and len(set(cases.values())) == len(cases)
    for name in ("mixer", "embedding", "loss", "recompute", "d_model", "vocab_size", "ar_ssm_max_rank"):
        assert len({getattr(case.model, name) for case in cases.values()}) > 1, name
    assert any(case.seq_length % 2 and case.batch_size % 2 for case in cases.values())
    assert min(Counter(case.model.mixer for case in cases.values()).values()) >= 8


@pytest.mark.parametrize(
    "errors, verdict",
    [
        ([1.0, -2.0, 5.0] + [1.9] * 22, "pass"),
        ([5.01] + [0.0] * 30, "fail"),
        ([-5.01] + [0.0] * 30, "fail"),
        ([-2.1] * 24, "fail"),
        ([1.0] * 23, "inconclusive"),
        ([9.0] * 3, "fail"),
        ([], "inconclusive"),
    ],
)
def test_the_verdict_is_on_the_median_and_the_worst_error_of_enough_cases(errors, verdict):
    assert judge([row(error) for error in errors] + [CalibrationRow("failed", "oom: out of memory")]).verdict == verdict


def test_a_row_compares_the_estimate_for_this_card_with_what_a_process_of_its_own_measured(monkeypatch):
    monkeypatch.setattr(module, "chip_of", lambda case: Chip(9, 0))
    estimated = estimate_memory(SMALL, Chip(9, 0))
    measured = replace(estimated, phase_bytes={"forward": 10**8}, peak_reserved_bytes=2 * estimated.peak_reserved_bytes)

    def isolated(function, case):
        assert function is module.measure_memory
        return Outcome("ok", measured) if case.batch_size == 1 else Outcome("oom", message="out of memory")

    monkeypatch.setattr(module, "run_isolated", isolated)
    good, bad = calibrate({"good": SMALL, "bad": replace(SMALL, batch_size=2)}, workers=2)
    assert (good.measured_bytes, good.estimated_bytes) == (10**8, estimated.peak_allocated_bytes)
    assert good.error_percent == pytest.approx(100 * (estimated.peak_allocated_bytes / 1e8 - 1))
    assert good.reserved_error_percent == pytest.approx(-50)
    assert good.unattributed_percent == pytest.approx(100 * (10**8 - estimated.peak_allocated_bytes) / 1e8)
    assert (bad.error_percent, bad.detail) == (None, "oom: out of memory")


def test_a_row_holds_what_explains_its_error_in_both_its_sides(monkeypatch):
    monkeypatch.setattr(module, "chip_of", lambda case: Chip(9, 0))
    estimated = estimate_memory(SMALL, Chip(9, 0))
    measured = replace(
        estimated, phase_bytes={"forward": 10**8, "backward": 1, "optimizer": 2}, breakdown={"parameters": 10**8}
    )
    monkeypatch.setattr(module, "run_isolated", lambda function, case: Outcome("ok", measured))
    (found,) = calibrate({"good": SMALL}, workers=1)
    assert (found.measured_phase_bytes, found.estimated_phase_bytes) == (measured.phase_bytes, estimated.phase_bytes)
    assert (found.measured_breakdown, found.estimated_breakdown) == (measured.breakdown, estimated.breakdown)
    assert found.measured_bytes == max(found.measured_phase_bytes.values())
    assert sum(found.estimated_breakdown.values()) == found.estimated_bytes


@pytest.mark.parametrize(
    "measured, estimated, text",
    [
        ({"forward": 1, "backward": 2}, {"forward": 1, "backward": 3}, "backward"),
        ({"forward": 1, "backward": 2}, {"forward": 4, "backward": 3}, "backward, estimated forward"),
        ({}, {}, None),
    ],
)
def test_a_row_names_the_phase_of_the_peak_and_that_of_the_estimate_where_it_differs(measured, estimated, text):
    assert CalibrationRow("case", measured_phase_bytes=measured, estimated_phase_bytes=estimated).peak_phase == text


def test_without_a_gpu_the_script_says_so_in_one_line(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--out-dir", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, code", [(1.0, 0), (6.0, 1)])
def test_the_script_writes_the_table_and_exits_by_the_verdict(script, monkeypatch, capsys, tmp_path, error, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "environment", lambda: {"gpu": "a card"})
    monkeypatch.setattr(script, "calibrate", lambda cases, workers: (row(error, name) for name in cases))
    assert script.main(["--out-dir", str(tmp_path)]) == code
    record = json.loads((tmp_path / "memory_calibration.json").read_text())
    assert record["verdict"] == ("fail" if code else "pass") and record["worst_percent"] == error
    assert len(record["rows"]) == len(calibration_cases()) and record["environment"]["gpu"] == "a card"
    assert record["rows"][0]["measured_phase_bytes"] == {"forward": 90, "backward": 100}
    text = (tmp_path / "memory_calibration.md").read_text()
    assert (
        "phase1 D512 L8 B4 T2048" in text
        and f"worst {error:.2f} %" in text
        and "backward, estimated forward" in text
        and "a card" in capsys.readouterr().out
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_few_cases_are_within_the_limits():
    cases = {name: case for name, case in calibration_cases().items() if "D256" in name}
    for found in calibrate(cases, workers=2):
        assert abs(found.error_percent) <= module.WORST_LIMIT and abs(found.unattributed_percent) <= 1, found
