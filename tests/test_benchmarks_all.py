"""The runner of all benchmarks, with commands that need no GPU."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("benchmarks_all", ROOT / "benchmarks" / "all.py")
all_ = importlib.util.module_from_spec(spec)
sys.modules["benchmarks_all"] = all_  # dataclasses look their module up
spec.loader.exec_module(all_)

NOTE = """
import os, time
began = time.time()
time.sleep(0.4)
print(began, time.time(), os.environ["CUDA_VISIBLE_DEVICES"])
"""
SLOW = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saved")
"""


@pytest.fixture
def job(tmp_path):
    def made(name, gpus=1, alone=True, code=NOTE, seconds=1):
        (tmp_path / f"{name}.py").write_text(code)
        return all_.Job(name, f"{sys.executable} {tmp_path}/{name}.py", seconds, gpus, alone)

    return made


def times(out):
    found = {}
    for log in (out / "logs").glob("*.log"):
        began, ended, gpus = log.read_text().split()
        found[log.stem] = (float(began), float(ended), gpus)
    return found


def overlap(a, b):
    return a[0] < b[1] and b[0] < a[1]


def run(jobs, tmp_path, gpus=2, seconds=60.0):
    return all_.run(jobs, all_.Machine(gpus), tmp_path, Path("data"), time.monotonic() + seconds)


def test_what_is_timed_has_a_gpu_to_itself_and_trainings_share_one(tmp_path, job, capsys):
    jobs = [job("timed"), job("a", alone=False), job("b", alone=False), job("c", alone=False), job("both", gpus=2)]
    assert run(jobs, tmp_path) == 0
    found = times(tmp_path)
    assert overlap(found["a"], found["b"]) and found["a"][2] == found["b"][2] != found["timed"][2]
    assert not overlap(found["c"], found["a"]) or not overlap(found["c"], found["b"]) or found["c"][2] != found["a"][2]
    assert all(not overlap(found["both"], found[other]) for other in ("timed", "a", "b", "c")) and found["both"][2] == "0,1"
    assert capsys.readouterr().out.count("done") == 5


def test_what_fails_and_what_there_is_no_room_for_is_said(tmp_path, job, capsys):
    jobs = [job("long", seconds=1000), job("many", gpus=8)]
    jobs += [job("broken", code="raise SystemExit(4)"), job("undecided", code="raise SystemExit(3)")]
    assert run(jobs, tmp_path) == 1
    said = capsys.readouterr().out
    assert "FAILED with 4, see" in said and "it takes some 1000 s" in said and "it needs 8 GPUs" in said
    assert run([job("many", gpus=8)], tmp_path) == 3


def test_what_still_runs_at_the_end_is_interrupted(tmp_path, job):
    began = time.monotonic()
    assert run([job("slow", code=SLOW, seconds=0)], tmp_path, seconds=1.5) == 3
    assert time.monotonic() - began < 20 and "saved" in (tmp_path / "logs" / "slow.log").read_text()


def test_jobs_are_chosen_by_the_beginning_of_their_names_in_the_order_asked_for():
    names = [job.name for job in all_.chosen(all_.JOBS, ["losses", "steps-phase1-64"])]
    assert names == ["losses", "steps-phase1-64-512", "steps-phase1-64-512-two_level"]
    assert len({job.name for job in all_.JOBS}) == len(all_.JOBS)


def test_every_record_that_is_awaited_has_a_job():
    """Scripts of benchmarks that write records, and what the commands of phase1 write into results/h200."""
    commands = " ".join(job.command for job in all_.JOBS)
    for script in (ROOT / "benchmarks").glob("*.py"):
        helps = script.name in ("all.py", "launches.py", "sequence_rows.py", "tune_together.py")  # launches: for a card to be tuned
        assert helps or f"benchmarks/{script.name}" in commands, script.name


def test_the_same_time_is_fewer_tokens_of_the_slower_model():
    tokens = all_.tokens_of_the_same_time()
    assert tokens % all_.STEP == 0 and 0.5 * all_.FULL < tokens < 1.5 * all_.FULL


@pytest.mark.parametrize("name", [job.name for job in all_.JOBS])
def test_every_command_is_one_that_its_program_takes(name, capsys):
    from phase1.cli import main

    job = next(job for job in all_.JOBS if job.name == name)
    program, *arguments = job.command.format(out="out", data="data", slots="0 0").removeprefix(sys.executable).split()
    if program == "-m":
        assert main([*arguments[1:], "--print-config"]) == 0, capsys.readouterr().err
        return
    program = arguments[0] if program == "bash" else program
    flags = [argument for argument in arguments if argument.startswith("--")]
    assert [flag for flag in flags if f'"{flag}"' not in Path(program).read_text()] == []


def test_a_machine_without_a_gpu_is_left_out_at_once(tmp_path, job, capsys):
    assert run([job("one"), job("all", gpus=None)], tmp_path, gpus=0) == 3
    assert capsys.readouterr().out.count("left out: it needs 1 GPUs") == 2


def test_a_job_that_two_words_name_runs_once(job):
    jobs = [job("memory"), job("steps"), job("steps-2")]
    assert [chosen.name for chosen in all_.chosen(jobs, ["steps", "mem", "memory", "steps-2"])] == ["steps", "steps-2", "memory"]


def test_the_list_needs_no_folder_and_a_run_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["all.py", "--list", "--only", "throughput"])
    assert all_.main() == 0 and capsys.readouterr().out.startswith("throughput")
    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "throughput", "OUT"])
    with pytest.raises(SystemExit):
        all_.main()
    assert "OUT" in capsys.readouterr().err
