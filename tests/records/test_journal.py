import contextlib
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from phase1.cli import main
from phase1.commands import pipeline
from phase1.errors import Unavailable
from phase1.machine.environment import deciding_settings, settings
from phase1.records import journal as module
from phase1.records.journal import Journal, code_sha256, open_journal
from phase1.records.schema import MemoryResult
from phase1.runs import MemoryRun, PerplexityRun, PipelineRun, ThroughputRun
from tests.fake_runs import CASES, config, fake, journal_of, result_of, run
from tests.reports import memory_result

MACHINE = {"cpu": "x"}


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The cases that the fake commands have begun, in the order of their beginning."""
    path = tmp_path / "begun"
    fake(monkeypatch, path)
    return lambda: path.read_text().split() if path.exists() else []


def opened(tmp_path, resume=True, **changes):
    parts = {"settings": {"batch_size": 4}, "machine": MACHINE, "data": {"train": "ab"}} | changes
    return open_journal(tmp_path / "report.json", **parts, resume=resume)


def kept(tmp_path, *cases):
    """A journal with these cases, as an interrupted run leaves it."""
    journal = opened(tmp_path, resume=False)
    for case in cases:
        journal.case(case, MemoryResult, lambda case=case: memory_result("phase1", len(case)))
    return tmp_path / "report.partial.json"


def never():
    raise AssertionError("computed again")


def test_a_finished_case_is_read_and_not_computed_again(tmp_path):
    kept(tmp_path, "a", "bb")
    again = opened(tmp_path)
    assert again.case("a", MemoryResult, never) == memory_result("phase1", 1)
    assert again.case("bb", MemoryResult, never) == memory_result("phase1", 2)
    assert again.case("ccc", MemoryResult, lambda: memory_result("phase1", 3)).peak_allocated_bytes == 3


def test_a_case_is_on_the_disk_before_the_next_one_begins_and_gone_after_close(tmp_path):
    journal, path = opened(tmp_path), tmp_path / "report.partial.json"
    journal.case("a", int, lambda: 1)
    assert json.loads(path.read_text())["cases"] == {"a": 1}
    journal.case("b", int, lambda: len(json.loads(path.read_text())["cases"]))
    assert json.loads(path.read_text())["cases"] == {"a": 1, "b": 1}
    journal.close()
    assert list(tmp_path.iterdir()) == []
    journal.close()


def test_without_resume_an_old_journal_stays_until_the_first_case_is_finished(tmp_path, capsys):
    path = kept(tmp_path, "a", "b")
    old = path.read_bytes()
    capsys.readouterr()
    journal = opened(tmp_path, resume=False)
    assert "--resume" in capsys.readouterr().err and path.read_bytes() == old
    with pytest.raises(KeyboardInterrupt):
        journal.case("a", int, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == old
    journal.case("a", int, lambda: 5)
    assert json.loads(path.read_text())["cases"] == {"a": 5}


def test_resume_without_a_journal_begins_at_the_beginning(tmp_path, capsys):
    assert opened(tmp_path).case("a", int, lambda: 3) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"settings": {"batch_size": 2}}, ["same config", "--batch-size 4 then and 2 now"]),
        ({"settings": {"batch_size": 4, "seq_length": 8}}, ["same config", "--seq-length None then and 8 now"]),
        ({"data": {"train": "cd"}}, ["same data", "train ab then and cd now"]),
        ({"data": None}, ["same data"]),
        ({"machine": {"cpu": "y"}}, ["same machine", "cpu x then and y now"]),
    ],
    ids=str,
)
def test_another_config_data_or_machine_is_refused_by_name_and_nothing_is_touched(tmp_path, changes, words):
    path = kept(tmp_path, "a")
    old = path.read_bytes()
    with pytest.raises(ValueError) as error:
        opened(tmp_path, **changes)
    message = str(error.value)
    assert message.isprintable() and all(word in message for word in [*words, str(path), "leave out --resume"]), message
    assert path.read_bytes() == old


def test_other_code_is_refused(tmp_path, monkeypatch):
    kept(tmp_path, "a")
    monkeypatch.setattr(module, "code_sha256", lambda: "0" * 64)
    with pytest.raises(ValueError, match="same code; got code that has changed since; go back to it, or leave out --resume"):
        opened(tmp_path)


def test_settings_that_change_no_case_may_differ():
    for kind in (MemoryRun, ThroughputRun, PerplexityRun, PipelineRun):
        ignored = {f.name for f in fields(kind)} - deciding_settings(kind()).keys()
        expected = {"out_dir", "resume", "verbose", "save_plots", "offline", "gpus"}
        assert ignored == expected & {f.name for f in fields(kind)}
    other = ThroughputRun(out_dir="elsewhere", save_plots=True, verbose=True, resume=True)
    assert deciding_settings(other) == deciding_settings(ThroughputRun()) != deciding_settings(ThroughputRun(batch_size=5))


def test_the_code_is_every_python_file_of_the_package_by_name_and_content(tmp_path, monkeypatch):
    package = tmp_path / "phase1"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sub" / "a.py").write_text("x = 1\n")
    (package / "sub" / "a.pyc").write_text("compiled")
    monkeypatch.setattr(module.phase1, "__file__", str(package / "__init__.py"))
    seen = {code_sha256()}
    (package / "sub" / "a.pyc").write_text("compiled again")
    assert code_sha256() in seen
    (package / "sub" / "a.py").write_text("x = 2\n")
    seen.add(code_sha256())
    (package / "sub" / "a.py").rename(package / "a.py")
    seen.add(code_sha256())
    assert len(seen) == 3


@pytest.mark.parametrize("value", [None, 1, "x", {}, {"status": "ok"}, {"peak_allocated_bytes": "3"}], ids=str)
def test_a_case_of_another_shape_is_refused(tmp_path, value):
    path = kept(tmp_path, "a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cases": {"a": value}}))
    with pytest.raises(ValueError, match="expected a finished case a; got .*; leave out --resume"):
        opened(tmp_path).case("a", MemoryResult, never)


def test_a_number_that_is_not_finite_is_refused_and_the_finished_cases_are_kept(tmp_path):
    path = kept(tmp_path, "a")
    old = path.read_bytes()
    with pytest.raises(ValueError):
        opened(tmp_path).case("b", float, lambda: float("nan"))
    assert path.read_bytes() == old


@pytest.mark.parametrize("command", CASES)
def test_an_uninterrupted_run_leaves_no_journal_and_resume_then_measures_anew(tmp_path, log, command):
    run(command, tmp_path / "out")
    assert log() == CASES[command]
    assert not journal_of(command, tmp_path / "out").exists()
    run(command, tmp_path / "out", resume=True)
    assert log() == CASES[command] * 2


@pytest.mark.parametrize("command, number", [(command, i) for command, cases in CASES.items() for i in range(len(cases))])
def test_a_run_interrupted_in_any_case_goes_on_with_it_and_ends_like_one_that_was_not(
    tmp_path, monkeypatch, command, number, capsys
):
    cases, out = CASES[command], tmp_path / "out"

    def interrupt(case):
        if case == cases[number]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        fake(patch, tmp_path / "whole")
        whole = run(command, tmp_path / "uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        fake(patch, tmp_path / "first", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(command, out)
    assert [p.name for p in out.glob("*")] == [journal_of(command, out).name] * (number > 0), "no report before its end"
    with pytest.MonkeyPatch.context() as patch:
        fake(patch, tmp_path / "second")
        assert run(command, out, resume=True) == whole
    assert (tmp_path / "first").read_text().split() == cases[: number + 1]
    assert (tmp_path / "second").read_text().split() == cases[number:]
    assert result_of(command, out) == result_of(command, tmp_path / "uninterrupted")
    assert not journal_of(command, out).exists()


@pytest.mark.parametrize("command", CASES)
def test_resume_with_another_flag_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, command):
    out, last = tmp_path / "out", CASES[command][-1]

    def interrupt(case):
        if case == last:
            raise KeyboardInterrupt

    fake(monkeypatch, tmp_path / "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(command, out)
    capsys.readouterr()
    arguments = ["--resume", "--out-dir", str(out), "--n-layers", "3"]
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected a run with the same config; got --" in error and "leave out --resume" in error


def test_the_training_data_is_part_of_what_must_be_equal(tmp_path, monkeypatch, log):
    from phase1.commands import perplexity

    out = tmp_path / "out"
    fine = perplexity.measure

    def breaks(run, model, texts):
        if model.key == "phase1_htt3_ar4":
            raise KeyboardInterrupt
        return fine(run, model, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "measure", breaks)
        with pytest.raises(KeyboardInterrupt):
            run("perplexity", out)
    corpus = perplexity.load_corpus()
    corpus.splits["train"].sha256 = "other"
    with pytest.raises(ValueError, match="same data; got train traintraintraintrain then and other now"):
        run("perplexity", out, resume=True)


def test_a_failure_in_a_later_model_keeps_the_earlier_ones(tmp_path, monkeypatch):
    def fails(case):
        if case == "phase1_htt2_ar4":
            raise ValueError("the data set is gone")

    with pytest.MonkeyPatch.context() as patch:
        fake(patch, tmp_path / "first", fails)
        with pytest.raises(ValueError, match="the data set is gone"):
            run("perplexity", tmp_path)
    fake(monkeypatch, tmp_path / "second")
    run("perplexity", tmp_path, resume=True)
    assert (tmp_path / "second").read_text().split() == CASES["perplexity"][1:]


class Steps:
    """What pipeline runs in place of the commands; step `broken` ends with `error`."""

    def __init__(self, error=None, broken=""):
        self.error, self.broken, self.begun = error, broken, []

    def __call__(self, name, config, log):
        self.begun.append((name, getattr(config, "resume", None)))
        if name == self.broken:
            raise self.error
        return 3 if name == "throughput" else 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Unavailable("no network")], ids=["interrupt", "error"])
def test_a_resumed_pipeline_runs_the_step_that_did_not_end_and_what_comes_of_all(tmp_path, monkeypatch, error):
    first, second = Steps(error, "perplexity"), Steps()
    monkeypatch.setattr(pipeline, "_run_step", first)
    settings = {"out_dir": str(tmp_path), "preset": "smoke"}
    with contextlib.suppress(KeyboardInterrupt):
        assert pipeline.main(PipelineRun(**settings)) == 3
    monkeypatch.setattr(pipeline, "_run_step", second)
    assert pipeline.main(PipelineRun(**settings, resume=True)) == 3
    assert second.begun == [("perplexity", True), ("tables", None), ("report", None)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [pipeline.LOG, pipeline.SUMMARY]


def test_the_report_of_a_resumed_run_has_the_settings_of_the_first(tmp_path):
    assert "resume" not in settings(config("memory", tmp_path, resume=True))


def test_a_disk_that_is_full_ends_the_command_with_exit_4_and_keeps_what_was_finished(tmp_path, monkeypatch, log, capsys):
    real, writes = os.replace, []

    def full(old, new):
        writes.append(new)
        if len(writes) == 3:
            raise OSError(28, "No space left on device", str(new))
        real(old, new)

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "out"
    assert main(["memory", "--out-dir", str(out)]) == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in out.iterdir()] == [journal_of("memory", out).name]
    assert main(["memory", "--out-dir", str(out), "--resume"]) in (0, 1, 3)
    assert log() == [*CASES["memory"][:3], *CASES["memory"][2:]]


def test_a_journal_is_named_after_its_report():
    assert open_journal(Path("a/b.json"), {}, machine={}, resume=True).path == Path("a/b.partial.json")
    assert isinstance(open_journal(Path("a/b.json"), {}, machine={}, resume=False), Journal)
