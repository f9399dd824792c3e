import json

import pytest

from phase1.cli import main
from phase1.records.schema import FILES, Dataset, write_report
from tests.reports import (
    ENVIRONMENT,
    all_reports,
    failed,
    measurement,
    memory_report,
    memory_result,
    perplexity_report,
    perplexity_result,
    throughput_report,
    throughput_result,
)

ALL = "peak:+2%,tokens_per_second:-5%,perplexity:+1%"


@pytest.fixture
def gate(tmp_path, capsys):
    """`phase1 compare` on two reports: its exit status, standard output and standard error."""

    def run(old, new, fail_on=None):
        for name, report in (("old", old), ("new", new)):
            write_report(report, tmp_path / f"{name}.json")
        return call(str(tmp_path / "old.json"), str(tmp_path / "new.json"), fail_on)

    def call(old, new, fail_on=None):
        code = main(["compare", old, new, "--verbose"] + ([] if fail_on is None else ["--fail-on", fail_on]))
        return code, *capsys.readouterr()

    run.paths = call
    return run


def peak(value, **changes):
    """A memory report of the engine alone."""
    return memory_report(results={"phase1": memory_result("phase1", 100, peak_allocated_bytes=value)}, checks=[], **changes)


def speed(seconds, role="phase1", **changes):
    return throughput_report(results={role: throughput_result(role, seconds)}, checks=[], **changes)


def perplexity(value, **changes):
    return perplexity_report(results={"baseline": perplexity_result("baseline", value, **changes)}, checks=[])


@pytest.mark.parametrize(
    "old, new, rule, code",
    [
        (peak(1000), peak(1020), "peak:+2%", 0),  # at the limit
        (peak(1000), peak(1021), "peak:+2%", 1),
        (peak(1000), peak(500), "peak:+2%", 0),
        (peak(1000), peak(980), "peak:-2%", 0),  # at the limit
        (peak(1000), peak(979), "peak:-2%", 1),
        (peak(1000), peak(1000), "peak:+0%", 0),
        (peak(1000), peak(1001), "peak:+0%,peak:-50%", 1),
        (speed([0.1] * 4), speed([0.104] * 4), "tokens_per_second:-5%", 0),
        (speed([0.1] * 4), speed([0.1, 0.1, 0.1, 0.11]), "tokens_per_second:-5%", 1),
        (speed([0.1] * 4), speed([0.01] * 4), "tokens_per_second:-5%", 0),
        (perplexity(30.0), perplexity(30.2), "perplexity:+1%", 0),
        (perplexity(30.0), perplexity(30.4), "perplexity:+1%", 1),
        (perplexity(30.0), perplexity(30.4), "perplexity:+1.5%", 0),
    ],
)  # fmt: skip
def test_a_rule_fails_past_its_limit_and_only_there(gate, old, new, rule, code):
    status, out, err = gate(old, new, rule)
    assert (status, err) == (code, "")
    assert ("FAIL" in out) == (code == 1)


def test_every_number_is_a_row_with_change_and_limit(gate):
    _, out, _ = gate(speed([0.1] * 4), speed([0.1, 0.1, 0.1, 0.125]), "tokens_per_second:-5%")
    rows = [line.split() for line in out.splitlines() if line.startswith("phase1 ")]
    assert rows[0] == ["phase1", "tokens_per_second", "512", "20,480", "20,480", "+0.00", "-5%", "PASS"]
    assert rows[3] == ["phase1", "tokens_per_second", "4096", "163,840", "131,072", "-20.00", "-5%", "FAIL"]
    assert "tokens_per_second:-5%: FAIL (1 of 4 past the limit)" in out


def test_without_a_rule_the_differences_are_printed_and_the_status_is_0(gate):
    status, out, _ = gate(peak(1000), peak(9000))
    assert status == 0 and "+800.00" in out and "FAIL" not in out and "PASS" not in out


def test_controls_are_not_compared(gate):
    old, new = throughput_report(checks=[]), throughput_report(checks=[])
    for report, seconds in ((old, 0.1), (new, 0.2)):
        report.results["baseline_again"] = throughput_result("baseline", [seconds] * 4)
    code, out, _ = gate(old, new, "tokens_per_second:-5%")
    assert code == 0 and "baseline_again" not in out


def test_two_folders_are_compared_kind_by_kind(gate, tmp_path):
    for folder in ("a", "b"):
        for kind, report in all_reports().items():
            write_report(report, tmp_path / folder / FILES[kind])
    status, out, _ = gate.paths(str(tmp_path / "a"), str(tmp_path / "b"), ALL)
    assert status == 0 and out.count(": PASS (") == 3
    (tmp_path / "b" / FILES["throughput"]).unlink()
    status, out, _ = gate.paths(str(tmp_path / "a"), str(tmp_path / "b"), ALL)
    assert status == 3 and "tokens_per_second:-5%: INCONCLUSIVE" in out and out.count(": PASS (") == 2
    assert gate.paths(str(tmp_path / "a"), str(tmp_path / "b" / FILES["memory"]), "peak:+2%")[0] == 0


CONDITIONS = {"batch_size": 4, "seq_length": 2048}
CONFIG = memory_result("phase1", 1000).config
TEXT = Dataset(name="other", split="train", sha256="cd" * 32)


@pytest.mark.parametrize(
    "new, rule, reason",
    [
        (peak(1000, environment=ENVIRONMENT | {"gpu": "Other"}), "peak:+2%", "hardware is NVIDIA Test 10GB in OLD and Other in NEW"),
        (peak(1000, environment={"device": "cpu"}), "peak:+2%", "hardware is NVIDIA Test 10GB in OLD and not recorded in NEW"),
        (peak(1000, run=CONDITIONS | {"batch_size": 8}), "peak:+2%", "batch_size is 4 in OLD and 8 in NEW"),
        (peak(1000, run=CONDITIONS | {"seq_length": 1024}), "peak:+2%", "at T = 1024: not in OLD"),
        (memory_report(results={"phase1": memory_result("phase1", 1000, config_id="x\x1b[2J")}), "peak:+2%", "config_id is id-phase1 in OLD and x?[2J in NEW"),
        (memory_report(results={"phase1": memory_result("phase1", 1000, config_id="x", config=CONFIG | {"d_model": 768})}), "peak:+2%", f"d_model is {CONFIG['d_model']} in OLD and 768 in NEW"),
        (memory_report(results={"phase1": memory_result("phase1", 1000, config_id="x", config=dict.fromkeys(CONFIG, 7))}), "peak:+2%", "more settings"),
        (memory_report(results={"phase1": memory_result("phase1", 1000, basis="estimated")}), "peak:+2%", "basis is measured in OLD and estimated in NEW"),
        (memory_report(results={"other": memory_result("baseline", 1000)}), "peak:+2%", "of other at T = 2048: not in OLD"),
        (perplexity(30.0, protocol_hash="fedcba987654"), "perplexity:+1%", "protocol_hash is 0123456789ab in OLD and fedcba987654 in NEW"),
        (perplexity(30.0, trained_tokens=1), "perplexity:+1%", "trained_tokens is 90000000 in OLD and 1 in NEW"),
        (perplexity(30.0, trained_on=TEXT), "perplexity:+1%", "trained_on is not recorded in OLD and"),
        (perplexity(30.0, untrained=True), "perplexity:+1%", "untrained is False in OLD and True in NEW"),
        (speed([0.1] * 4, run={"compile": True}), "tokens_per_second:-5%", "compile is False in OLD and True in NEW"),
        (speed([0.1] * 4, run={"precision": "float16"}), "tokens_per_second:-5%", "precision is not recorded in OLD and float16 in NEW"),
    ],
)  # fmt: skip
def test_other_conditions_are_not_compared_and_leave_the_rule_inconclusive(gate, new, rule, reason):
    old = {"memory": peak(1000), "throughput": speed([0.1] * 4), "perplexity": perplexity(30.0)}[new.kind]
    status, out, _ = gate(old, new, rule)
    assert status == 3 and reason in out and "INCONCLUSIVE" in out and "PASS" not in out and "\x1b" not in out
    assert gate(old, new)[0] == 0


@pytest.mark.parametrize(
    "environment, run, name", [({}, CONDITIONS, "hardware"), (ENVIRONMENT, {"seq_length": 2048}, "batch_size")]
)
def test_a_condition_that_neither_file_records_is_not_taken_as_equal(gate, environment, run, name):
    report = peak(1000, environment=environment, run=run)
    status, out, _ = gate(report, report, "peak:+2%")
    assert status == 3 and f"{name} is not recorded" in out


def test_two_untrained_models_are_not_compared(gate):
    status, out, _ = gate(perplexity(30.0, untrained=True), perplexity(30.0, untrained=True), "perplexity:+1%")
    assert status == 3 and "untrained in both" in out


def test_one_comparable_model_decides_and_the_others_are_named(gate):
    old = memory_report()
    new = memory_report(results={"phase1": old.results["phase1"]})
    status, out, _ = gate(old, new, "peak:+2%")
    assert status == 0 and "peak:+2%: PASS (0 of 1 past the limit, 2 n/a)" in out
    assert "not comparable: peak of baseline at T = 2048: not in NEW" in out


@pytest.mark.parametrize("status", ["oom", "error"])
def test_a_number_that_the_new_run_lost_is_a_failure(gate, status):
    lost = memory_report(results={"phase1": memory_result("phase1", 1).model_validate(failed("phase1", status))}, checks=[])
    code, out, _ = gate(peak(1000), lost, "peak:+2%")
    assert code == 1 and f"lost: peak of phase1 at T = 2048: NEW failed ({status}: out of memory" in out
    code, out, _ = gate(lost, peak(1000), "peak:+2%")
    assert code == 3 and f"OLD failed ({status}: " in out
    assert gate(lost, lost, "peak:+2%")[0] == 3


def test_a_length_that_ran_out_of_memory_is_lost_alone(gate):
    new = speed([0.1] * 4)
    new.results["phase1"].measurements[3] = measurement(
        4096, 1.0, status="oom", total_time_ms=None, tokens_per_second=None, detail="try --batch-size 2"
    )
    code, out, _ = gate(speed([0.1] * 4), new, "tokens_per_second:-5%")
    assert code == 1 and "(1 of 4 past the limit)" in out and "try --batch-size 2" in out


def test_another_batch_is_another_throughput(gate):
    new = speed([0.1] * 4)
    new.results["phase1"].measurements[:] = [m.model_copy(update={"batch_size": 8}) for m in new.results["phase1"].measurements]
    code, out, _ = gate(speed([0.1] * 4), new, "tokens_per_second:-5%")
    assert code == 3 and out.count("batch_size is 4 in OLD and 8 in NEW") == 5, "of each length, and once in the answer"


def test_a_failed_rule_outweighs_an_inconclusive_one(gate):
    code, out, _ = gate(peak(1000), peak(2000), "perplexity:+1%,peak:+2%")
    assert code == 1 and "perplexity:+1%: INCONCLUSIVE" in out and "peak:+2%: FAIL" in out


def test_a_failed_model_need_not_say_what_it_was_trained_on(gate):
    lost = perplexity(30.0).results["baseline"].model_validate(failed("baseline"))
    code, out, _ = gate(perplexity(30.0), perplexity_report(results={"baseline": lost}, checks=[]), "perplexity:+1%")
    assert code == 1 and "lost: perplexity of baseline at T = 512" in out


def test_a_failed_model_on_unknown_hardware_is_not_a_regression(gate):
    lost = memory_report(results={"phase1": memory_result("phase1", 1).model_validate(failed("phase1"))}, environment={})
    assert gate(peak(1000), lost, "peak:+2%")[0] == 3


def test_a_lost_number_under_other_conditions_is_only_not_comparable(gate):
    lost = memory_report(
        results={"phase1": memory_result("phase1", 1).model_validate(failed("phase1"))}, environment={"gpu": "Other"}
    )
    assert gate(peak(1000), lost, "peak:+2%")[0] == 3


@pytest.mark.parametrize(
    "old, new, rule, code",
    [
        (0, 0, "peak:+2%", 0),
        (0, 5, "peak:+2%", 1),
        (0, 5, "peak:-2%", 0),
        (5, 0, "peak:-2%", 1),
        (5, 0, "peak:+2%", 0),
        (-5, -5, "peak:+2%", 3),
    ],
)
def test_an_old_0_has_no_percentage_but_a_verdict(gate, old, new, rule, code):
    status, out, _ = gate(peak(old), peak(new), rule)
    assert status == code and "nan" not in out.lower() and "inf" not in out.lower()


def test_extreme_numbers_neither_overflow_nor_round(gate):
    old, new = (
        {"baseline": perplexity_result("baseline", 30.0).model_copy(update={"perplexity": p})} for p in (5e-324, 1.7e308)
    )
    status, out, _ = gate(perplexity_report(results=old), perplexity_report(results=new), "perplexity:+1%")
    assert status == 1 and "nan" not in out and "inf" not in out
    assert gate(peak(10**18), peak(10**18 + 1), "peak:+0%")[0] == 1


@pytest.mark.parametrize(
    "rule",
    ["", "peak", "peak:2%", "peak:+2", "peak:+x%", "peak:+nan%", "peak:+1e3%", "peak:++2%", "peak:+2%,", ",", "speed:+2%", "peak:+2%;perplexity:+1%",
     "peak:-0%", "peak:-100%", "peak:+2%,peak:+3%", "Peak:+2%", "peak:+٢%", "peak:+2%\n\x1b[2J"],
)  # fmt: skip
def test_a_malformed_rule_is_one_line_and_status_2(gate, rule):
    status, out, err = gate(peak(1000), peak(1000), rule)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and "--fail-on" in err and "\x1b" not in err


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"{}", b'{"schema_version": 1, "kind": "other"}', b'{"schema_version": 1, "kind": []}', b"\xff", b"[" * 100_000,
     b'{"schema_version": 1, "kind": "memory"}', b'{"schema_version": 9, "kind": "memory"}', b'{"kind": NaN}'],
)  # fmt: skip
def test_a_missing_or_foreign_file_is_one_line_and_status_2(gate, tmp_path, content):
    write_report(peak(1000), tmp_path / "good.json")
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    for paths in ((bad, tmp_path / "good.json"), (tmp_path / "good.json", bad)):
        status, out, err = gate.paths(*map(str, paths), "peak:+2%")
        assert (status, out) == (2, "") and err.count("\n") == 1 and "bad.json" in err


def test_a_folder_without_results_and_files_of_different_kinds_are_refused(gate, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = gate.paths(str(tmp_path / "empty"), str(tmp_path / "empty"))
    assert status == 2 and err.count("\n") == 1 and "expected a folder with" in err
    status, _, err = gate(peak(1000), perplexity(30.0))
    assert status == 2 and "got memory in OLD, perplexity in NEW" in err


def test_two_measurements_at_one_length_are_refused(gate):
    report = speed([0.1] * 4)
    report.results["phase1"].measurements.append(measurement(512, 0.2))
    status, _, err = gate(report, report, "tokens_per_second:-5%")
    assert status == 2 and "T = 512 twice" in err


def test_nothing_is_written(gate, tmp_path):
    gate(peak(1000), peak(1000), "peak:+2%")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "old.json"]
    assert json.loads((tmp_path / "old.json").read_text())["kind"] == "memory"
