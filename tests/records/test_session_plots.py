"""What a run leaves in its folder, whatever goes wrong at its end."""

import pytest

from phase1.records.schema import FILES, read_report
from phase1.records.session import Session
from phase1.runs import MemoryRun
from tests.reports import memory_report


@pytest.fixture
def session(tmp_path, monkeypatch):
    made = Session(MemoryRun(out_dir=str(tmp_path)), "memory")
    made._facts = {"cpu": "x"}
    return made


def written(session, *plots):
    return session.write(memory_report().results, [], plots=[(plot, f"phase1_memory_{i}.png") for i, plot in enumerate(plots)])


@pytest.mark.parametrize("error", [RuntimeError("latex could not be found"), OSError(28, "No space left"), ValueError("x\ny"), KeyError()])
def test_a_plot_that_fails_is_a_line_and_costs_neither_the_report_nor_the_other_plots(session, tmp_path, capsys, error):
    def fails(report, path):
        raise error

    def works(report, path):
        path.write_bytes(b"a picture")
        return path

    _, files = written(session, fails, works)
    assert files == [tmp_path / FILES["memory"], tmp_path / "phase1_memory_1.png"]
    assert read_report(files[0], "memory").results
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("phase1 memory: warning: no plot phase1_memory_0.png (") and type(error).__name__ in line


def test_a_plot_of_an_earlier_run_beside_a_new_report_is_named(session, tmp_path, capsys):
    (tmp_path / "phase1_memory_timeline.png").write_bytes(b"older")
    (tmp_path / "phase1_throughput_comparison.png").write_bytes(b"of another command")
    written(session)
    (line,) = capsys.readouterr().err.splitlines()
    assert "phase1_memory_timeline.png is of an earlier one" in line
