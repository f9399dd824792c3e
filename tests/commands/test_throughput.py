from dataclasses import asdict

import pytest
import torch

from phase1.checks.throughput import decoding_checks, throughput_checks
from phase1.commands import compare, throughput
from phase1.commands import report as report_command
from phase1.records.schema import Decoding, Scaling, ThroughputResult, exit_code, read_report, write_report
from phase1.roster import COMPILED
from phase1.runs import CompareRun, ReportRun, ThroughputRun
from phase1.tables import throughput_comparison
from phase1.tables.console import throughput_text
from phase1.tables.screen import text
from tests.reports import throughput_report, throughput_result

SIZES = {
    "vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 2, "htt_dense_rows": 64, "htt_groups": 16, "htt_rank": 4,
    "ar_ssm_max_rank": 8, "ar_ssm_window": 8, "batch_size": 1, "seq_lengths": (8, 16, 32, 64), "warmup_steps": 1,
    "measure_steps": 3,
}  # fmt: skip


def run(tmp_path, **overrides) -> ThroughputRun:
    return ThroughputRun(**(SIZES | {"out_dir": str(tmp_path)} | overrides))


def engine(verdict="linear", r_squared=0.999, lengths=4, exponent=1.0) -> ThroughputResult:
    measurement = {"batch_size": 1, "status": "ok", "total_time_ms": 1.0, "tokens_per_second": 1.0}
    return ThroughputResult.model_validate(
        {
            "model_name": "phase1", "config": {}, "config_id": "0", "status": "ok", "basis": "measured",
            "parameters": {"total": 1, "embedding": 1, "mixer": 0, "mlp": 0},
            "measurements": [measurement | {"seq_length": 2**i} for i in range(lengths)],
            "scaling": Scaling(verdict=verdict, r_squared=r_squared, exponent=exponent),
        }
    )  # fmt: skip


def test_it_writes_every_model_and_length_with_plot_and_checks(tmp_path, capsys):
    code = throughput.main(run(tmp_path, save_plots=True, verbose=True))
    report = read_report(tmp_path / "phase1_throughput_benchmark.json", "throughput")
    assert list(report.results) == ["baseline", "baseline_optimized", "baseline_fast", "phase1"]
    for one in report.results.values():
        assert [m.seq_length for m in one.measurements] == [8, 16, 32, 64]
        assert one.basis == "measured" and one.excluded_seconds > 0 and one.scaling is not None
    assert report.environment["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert report.run["precision"] == ("float16" if torch.cuda.is_available() else "float32")
    assert [check.name for check in report.checks] == ["scaling_linear", "r_squared"]
    assert code in (0, 1, 3)
    out = capsys.readouterr().out
    assert "files " in out and "tokens" in out
    assert (tmp_path / throughput.PLOT).stat().st_size > 1000


def test_controls_are_measured_beside_the_models_and_checked(tmp_path, capsys):
    code = throughput.main(run(tmp_path, a_a=True, quadratic_control=True, measure_steps=9, verbose=True))
    report = read_report(tmp_path / "phase1_throughput_benchmark.json", "throughput")
    assert list(report.results) == ["baseline", "baseline_optimized", "baseline_fast", "phase1", "quadratic_control", "baseline_again"]
    checks = {check.name: check for check in report.checks}
    assert list(checks) == ["scaling_linear", "r_squared", "a_a_no_difference", "control_rejected"]
    assert checks["a_a_no_difference"].status in ("pass", "fail") and checks["control_rejected"].detail
    assert report.results["baseline_again"].config_id == report.results["baseline"].config_id
    control = report.results["quadratic_control"]
    assert control.config == report.results["baseline_optimized"].config | {"attention": "math"}
    for m, same in zip(control.measurements, report.results["baseline_optimized"].measurements):
        assert m.model_flops == same.model_flops
        assert m.tokens_per_second_ci95 and m.ratio_ci95 and m.achieved_flops_per_second > 0
    assert code == exit_code(report.checks)
    out = capsys.readouterr().out
    assert "quadratic_control" in out and "control_rejected" in out and " to " in out


def test_without_baselines_the_engine_is_measured_twice(tmp_path):
    throughput.main(run(tmp_path, baseline=False, a_a=True, seq_lengths=(8, 16)))
    report = read_report(tmp_path / "phase1_throughput_benchmark.json", "throughput")
    assert list(report.results) == ["phase1", "engine_again"]
    assert report.checks[-1].name == "a_a_no_difference" and report.checks[-1].status == "inconclusive"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs")
def test_cuda_graphs_without_a_gpu_are_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="--cuda-graphs needs a GPU; got a run on the CPU; leave it out"):
        throughput.main(run(tmp_path / "out", cuda_graphs=True))
    assert not (tmp_path / "out").exists()


def test_warnings_of_the_run_and_of_models_are_written_printed_and_in_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "run_warnings", lambda samples, cpu: ["the room is on fire: leave"])
    monkeypatch.setattr(throughput, "model_warnings", lambda measurements, device: ["slow: hurry"])
    throughput.main(run(tmp_path, baseline=False, seq_lengths=(8, 16), verbose=True))
    report = read_report(tmp_path / "phase1_throughput_benchmark.json", "throughput")
    assert report.warnings == ["the room is on fire: leave"] and report.results["phase1"].warnings == ["slow: hurry"]
    out = capsys.readouterr().out
    assert out.count("WARNING the room is on fire: leave") == 1 and out.count("WARNING phase1: slow: hurry") == 1
    notes = throughput_comparison(report).printed_notes
    assert {"WARNING the room is on fire: leave", "WARNING phase1: slow: hurry"} <= set(notes)


def test_no_baseline_leaves_both_out_and_without_the_flag_there_is_no_plot(tmp_path):
    throughput.main(run(tmp_path, baseline=False, seq_lengths=(8, 16)))
    report = read_report(tmp_path / "phase1_throughput_benchmark.json", "throughput")
    assert list(report.results) == ["phase1"]
    assert {check.status for check in report.checks} == {"inconclusive"}, "two lengths decide nothing"
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("verdict, status", [("linear", "pass"), ("not linear", "fail"), ("inconclusive", "inconclusive")])
def test_the_scaling_check_follows_the_verdict(verdict, status):
    check = throughput_checks(engine(verdict))[0]
    assert (check.value, check.limit, check.status) == (1.0, None, status)
    assert verdict in check.detail


@pytest.mark.parametrize("r_squared, lengths, status", [(0.951, 4, "pass"), (0.95, 4, "fail"), (1.0, 3, "inconclusive")])
def test_r_squared_must_exceed_its_limit_over_enough_lengths(r_squared, lengths, status):
    check = throughput_checks(engine(r_squared=r_squared, lengths=lengths))[1]
    assert (check.value, check.limit, check.status) == (r_squared, 0.95, status)


def test_an_engine_that_was_measured_nowhere_decides_nothing():
    nowhere = ThroughputResult(
        model_name="phase1", config={}, config_id="0", status="oom", basis="measured", detail="out of memory"
    )
    assert [check.status for check in throughput_checks(nowhere)] == ["inconclusive", "inconclusive"]


def test_an_interrupt_passes_and_leaves_an_old_report_as_it_is(tmp_path, monkeypatch):
    old = tmp_path / "phase1_throughput_benchmark.json"
    old.write_text("old")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "measure_throughput", interrupted)
    with pytest.raises(KeyboardInterrupt):
        throughput.main(run(tmp_path))
    assert old.read_text() == "old"


def test_generation_is_measured_where_it_is_asked_for(tmp_path, capsys):
    sizes = {"seq_lengths": (8,), "decode_contexts": (8, 64), "measure_steps": 5}
    throughput.main(run(tmp_path, decode=True, cuda_graphs=False, verbose=True, **sizes))
    report = read_report(tmp_path / "phase1_throughput_benchmark.json", "throughput")
    assert {role for role, result in report.results.items() if result.decoding is not None} == {"baseline", "phase1"}
    assert "decode_constant" in {check.name for check in report.checks}
    out = capsys.readouterr().out
    assert out.startswith("Generation: B = 1") and "Decode" in out and "longest over shortest" in out
    screen = out[out.index("Speed of training steps") :]
    assert "generated/s after" in screen and "generation as fast after any context" in screen


def decoding(verdict):
    return Decoding(points=[], speed_ratio=0.97, verdict=verdict)


@pytest.mark.parametrize(
    "ours, theirs, status",
    [
        ("constant", "not constant", "pass"),
        ("constant", "constant", "inconclusive"),  # a measurement that sees no growth where there is some
        ("constant", "inconclusive", "inconclusive"),
        ("constant", None, "inconclusive"),
        ("not constant", "not constant", "fail"),
        ("inconclusive", "not constant", "inconclusive"),
    ],
)
def test_generation_passes_only_if_the_transformer_is_found_to_slow_down(ours, theirs, status):
    results = {"phase1": engine().model_copy(update={"decoding": decoding(ours)})}
    if theirs is not None:
        results["baseline"] = engine().model_copy(update={"decoding": decoding(theirs)})
    (check,) = decoding_checks(results)
    assert (check.name, check.status, check.value, check.limit) == ("decode_constant", status, 0.97, 0.95)


def test_without_generation_there_is_no_check_of_it():
    assert decoding_checks({"phase1": engine()}) == []


def test_on_a_gpu_both_kinds_of_model_are_measured_as_fast_as_flags_make_them():
    on_gpu, on_cpu = (throughput.models(ThroughputRun(), device) for device in ("cuda", "cpu"))
    assert on_gpu.keys() - on_cpu.keys() == {"phase1_fast"} and {"baseline_fast", "phase1_fast"} == COMPILED
    assert on_gpu["phase1_fast"].recompute == on_gpu["baseline_fast"].recompute == "none"
    assert on_gpu["phase1_fast"].config_id != on_gpu["phase1"].config_id


def test_every_model_that_is_measured_on_a_gpu_has_its_place_in_report_screen_table_page_and_plot(tmp_path, capsys):
    settings = ThroughputRun(a_a=True, quadratic_control=True, model=("mine=json:loads",), out_dir=str(tmp_path))
    wanted = throughput.models(settings, "cuda")
    assert {"phase1_fast", "baseline_fast", "mine"} <= set(wanted)
    one = throughput_result("phase1", [0.02, 0.046, 0.116, 0.228])
    results = {
        role: one.model_copy(update={"model_name": role, "config": asdict(config), "config_id": config.config_id})
        for role, config in wanted.items()
    }
    report = throughput_report(results=results)
    write_report(report, path := tmp_path / "phase1_throughput_benchmark.json")
    assert list(read_report(path, "throughput").results) == list(wanted)
    assert "PASS" in text(throughput.screen(settings, report, [path]))
    assert all(role in throughput_text(report) for role in wanted)
    assert throughput.plot_throughput(report, tmp_path / throughput.PLOT).stat().st_size > 1000
    assert report_command.main(ReportRun(results_dir=str(tmp_path), out=str(tmp_path / "page.html"))) == 0
    assert compare.main(CompareRun(old=str(path), new=str(path))) == 0
