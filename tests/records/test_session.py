"""A session tries its folder first, and loses no report of another command."""

import pytest

from phase1.records.collect import read_reports
from phase1.records.schema import read_report
from phase1.records.session import Session
from phase1.runs import MemoryRun
from tests.reports import memory_report, memory_result


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["phase1", "memory"])
    monkeypatch.setattr("phase1.records.session.environment", lambda: {"cpu": "x"})
    return lambda: Session(MemoryRun(out_dir=str(tmp_path / "out")), "memory")


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Session(MemoryRun(out_dir=str(tmp_path / "file")), "memory")
    with pytest.raises(OSError):
        Session(MemoryRun(out_dir=str(tmp_path / "file" / "inside")), "memory")


def test_a_folder_in_the_place_of_the_report_is_an_error_before_any_work(session, tmp_path):
    (tmp_path / "out" / "phase1_memory_validation.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^--out-dir must have a file at \S+, or nothing; got a folder; move it away, or give another"):
        session()


def test_trying_leaves_nothing_behind(session, tmp_path):
    session()
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    session()
    assert list((tmp_path / "out").iterdir()) == []


def write(session, **fields):
    return session().write({"phase1": memory_result("phase1", 1)}, [], **fields)


def test_a_report_has_settings_facts_and_command_and_names_what_was_written(session, tmp_path):
    report, files = write(session, plots=[(lambda report, path: path, "a.png")])
    assert (report.kind, report.command, report.environment) == ("memory", "phase1 memory", {"cpu": "x"})
    assert report.run["batch_size"] == 4
    assert [path.name for path in files] == ["phase1_memory_validation.json", "a.png"]
    assert read_report(files[0], "memory") == report


def test_the_report_of_the_same_command_is_replaced_and_of_another_kept(session, tmp_path, monkeypatch):
    _, files = write(session)
    assert len(write(session)[1]) == 1
    monkeypatch.setattr("sys.argv", ["phase1", "memory", "--fit"])
    report, files = write(session)
    assert [path.name for path in files] == ["phase1_memory_validation.json", "phase1_memory_validation.previous.json"]
    assert read_report(files[1], "memory").command == "phase1 memory" and report.command == "phase1 memory --fit"


def test_no_kept_report_is_replaced_by_a_later_one(session, tmp_path, monkeypatch, capsys):
    for words in (["--fit"], ["--ablate"], ["--dry-run"], ["--fit"]):
        monkeypatch.setattr("sys.argv", ["phase1", "memory", *words])
        _, files = write(session)
    path = tmp_path / "out" / "phase1_memory_validation.json"
    kept = [path.with_name(f"phase1_memory_validation.previous{number}.json") for number in ("", "-2", "-3")]
    assert [read_report(file, "memory").command[14:] for file in kept] == ["--fit", "--ablate", "--dry-run"]
    assert files == [path, kept[2]]
    line = f"replaced: {path}, the report of other flags (kept as phase1_memory_validation.previous-2.json); --out-dir keeps runs apart"
    assert line in capsys.readouterr().err.splitlines()
    assert [report.command for report in read_reports(tmp_path / "out").values()] == ["phase1 memory --fit"]


def test_what_is_no_report_of_ours_is_replaced(session, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "phase1_memory_validation.json").write_text("{}")
    _, files = write(session)
    assert len(files) == 1 and memory_report().kind == "memory"
