import getpass
import json
import socket
from datetime import datetime
from pathlib import Path

import torch

from phase1 import __version__
from phase1.cli import main
from phase1.commands import doctor
from phase1.runs import DoctorRun


def test_doctor_prints_what_a_bug_report_needs(capsys):
    assert doctor.main(DoctorRun()) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["phase1"] == __version__ and lines["torch"] == torch.__version__
    assert {"git_commit", "gpu", "driver", "cuda_works", "triton_works", "free_gpu_bytes", "numpy"} <= set(lines)
    assert "GiB" in lines["free_ram_bytes"]
    assert lines["cuda_works"] == "works" if torch.cuda.is_available() else lines["cuda_works"].startswith("no: ")


def test_doctor_names_no_home(capsys):
    doctor.main(DoctorRun())
    assert str(Path.home()) not in capsys.readouterr().out


def test_the_file_to_submit_holds_the_printed_facts_and_names_nobody(capsys, tmp_path):
    file = tmp_path / "card.json"
    assert main(["doctor", "--submit-file", str(file)]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    facts = json.loads(file.read_text())
    assert datetime.fromisoformat(facts.pop("created_utc")).tzinfo is not None
    assert facts.keys() == printed.keys() - {"next"}
    for name in ("phase1", "torch", "cuda_works", "triton_works", "gpu"):
        assert printed[name] == ("-" if facts[name] is None else facts[name])
    assert not any(private in file.read_text() for private in (str(Path.home()), str(Path.cwd()), str(tmp_path)))
    assert not {getpass.getuser(), socket.gethostname()} & set(map(str, facts.values()))


def test_a_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--submit-file", str(tmp_path / "file" / "card.json")]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1
