"""Results that survive: processes killed at any moment leave whole files, and every finished case.

The environment variable PHASE1_TORTURE is the number of SIGKILLs at random moments; `make torture` sets 1,000.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from phase1.records.metrics import METRICS, MetricsLog, read_metrics
from phase1.records.schema import FILES, read_report, write_report
from phase1.training import job
from phase1.training.checkpoint import INDEX, load_model, resume, save_checkpoint
from tests.fake_runs import CASES, fake, journal_of, killed_child, result_of, run
from tests.reports import memory_report
from tests.training.test_step import state
from tests.training.test_trackers import train

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "results" / "archive" / "h100"
KILLS = int(os.environ.get("PHASE1_TORTURE", "60"))
CHECKPOINT_KILLS = max(4, KILLS // 20)
RUN_KILLS = max(14, KILLS // 10)  # runs of each command, most of them killed once or more
POSIX = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")

# argv: path, first number, k to die at the k-th line that runs in files.py (0: wait for the signal), folder of reports.
# Prints the number of each report once its write has returned.
WRITER = """
import itertools, os, signal, sys
from phase1 import files
from phase1.records.schema import FILES, read_report, write_report

path, number, moment = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
reports = [read_report(f"{sys.argv[4]}/{FILES[kind]}", kind) for kind in ("memory", "throughput")]

def die_at(frame, event, arg):
    global moment
    if frame.f_code.co_filename != files.__file__:
        return None
    if event == "line":
        moment -= 1
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return die_at

for number in itertools.count(number):
    report = reports[number % 2].model_copy(update={"run": {"number": number}})
    if moment and number > int(sys.argv[2]):  # the first write is whole
        sys.settrace(die_at)
    write_report(report, path)
    sys.settrace(None)
    os.write(1, b"%d\\n" % number)
"""

SAVER = """
import itertools, os, sys
import torch
from phase1.training.checkpoint import save_checkpoint
from phase1.training.step import train_step
from tests.training.test_step import as_tensors, batch_at, state

s = state()
train_step(s, as_tensors(batch_at(0), 4))
for s.step in itertools.count(int(sys.argv[2])):
    with torch.no_grad():
        for p in s.model.parameters():
            p.fill_(s.step)
            for kept in s.optimizer.state[p].values():
                kept.fill_(s.step)
    save_checkpoint(sys.argv[1], s, {"step": s.step}, resumable=s.step % 2 == 0)
    os.write(1, b"%d\\n" % s.step)
"""


def last_confirmed(program, path, number, seconds, moment=0):
    """Run `program` from `number` on, kill it `seconds` after its first write; the last number that it confirmed."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(number), str(moment), str(MEASURED)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # a line that readline had buffered would be lost to communicate
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
    )
    with child:
        first = child.stdout.readline()
        if not moment:
            time.sleep(seconds)
            child.kill()
        rest, errors = child.communicate(timeout=60)
    assert first and child.returncode == -signal.SIGKILL, errors.decode()
    return int((first + rest).split()[-1])


def number_of(path):
    """The number of the report at `path`, which is memory or throughput by turns."""
    kind = json.loads(path.read_text())["kind"]
    number = read_report(path, kind).run["number"]
    assert kind == ("memory", "throughput")[number % 2]
    return number


@POSIX
def test_a_writer_killed_at_any_moment_leaves_the_last_confirmed_report_or_the_one_in_flight(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "report.json"
    number = 0
    for trial in range(KILLS):
        # half by the clock, half at a line of files.py: the clock rarely finds the gap between two system calls
        moment = rng.randrange(1, 60) if trial % 2 else 0
        confirmed = last_confirmed(WRITER, path, number, rng.uniform(0, 0.02), moment)
        number = number_of(path)
        assert number in (confirmed, confirmed + 1), f"trial {trial}, line {moment}"
        number += 2  # the next child starts over what this one left
    left = {p.name for p in tmp_path.iterdir()} - {path.name}
    assert all(name.startswith(f".{path.name}.") and name.endswith(".tmp") for name in left)
    assert len(left) <= 1  # of the last one killed: every write removes what those before it have left
    write_report(memory_report(run={"number": number + number % 2}), path)
    assert number_of(path) == number + number % 2
    assert os.listdir(tmp_path) == [path.name]


@POSIX
def test_a_saver_killed_at_any_moment_leaves_a_checkpoint_of_one_step(tmp_path):
    rng = random.Random(2)
    number = 1
    for trial in range(CHECKPOINT_KILLS):
        confirmed = last_confirmed(SAVER, tmp_path, number, rng.uniform(0, 0.05))
        model, facts = load_model(tmp_path)
        assert facts["step"] in (confirmed, confirmed + 1), f"trial {trial}"
        assert all((p == facts["step"]).all() for p in model.parameters())
        if facts["step"] % 2 == 0:
            again = state()
            assert resume(tmp_path, again) == facts and again.step == facts["step"]
            assert all((kept == again.step).all() for values in again.optimizer.state.values() for kept in values.values())
        number = facts["step"] + 2
    last = state()
    last.step = number
    save_checkpoint(tmp_path, last, {"step": number})
    seen = sorted(p.name for p in tmp_path.iterdir())
    assert seen == [INDEX, f"model-{number:08d}.safetensors", f"training-{number:08d}.safetensors"]


def dying_at(line, action):
    """`action`, killed when line number `line` of those that run in commands and in what writes files is about to run."""
    package, seen = ROOT / "src" / "phase1", 0
    files = {str(package / name) for name in ("journal.py", "files.py", "record.py")}
    files |= {str(path) for path in (package / "commands").iterdir()}

    def watch(frame, event, arg):
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return watch

    def traced():
        sys.settrace(watch)
        action()
        return seen

    return traced


@POSIX
@pytest.mark.parametrize("command", CASES)
def test_a_run_killed_at_any_moment_resumes_with_at_most_one_case_redone_and_ends_like_one_that_was_not(
    tmp_path, monkeypatch, command
):
    rng, log, whole = random.Random(command), tmp_path / "begun", tmp_path / "whole"
    fake(monkeypatch, log)
    counted = dying_at(0, lambda: run(command, whole))
    assert killed_child(lambda: (tmp_path / "lines").write_text(str(counted()))) == 0
    last_line, expected = int((tmp_path / "lines").read_text()), result_of(command, whole)
    began = time.perf_counter()
    run(command, whole)
    seconds = time.perf_counter() - began
    for trial in range(RUN_KILLS):
        out, kills = tmp_path / f"{trial}", 0
        log.write_text("")
        while kills < rng.choice([1, 1, 2, 3]):
            action = partial(run, command, out, resume=kills > 0)
            if rng.random() < 0.5:  # by the clock: inside a case or a system call; at a line: between any two of them
                status = killed_child(action, lambda pid: (time.sleep(rng.uniform(0, seconds)), os.kill(pid, signal.SIGKILL)))
            else:
                status = killed_child(dying_at(min(rng.randrange(1, last_line), rng.randrange(1, last_line)), action))
            assert status in (0, signal.SIGKILL), f"trial {trial}"
            if status == 0 or ((out / FILES[command]).exists() and not journal_of(command, out).exists()):
                break  # it had ended before
            kills += 1
            begun = list(dict.fromkeys(log.read_text().split()))
            assert kept_cases(command, out) in (begun, begun[:-1]), f"trial {trial}: a finished case is lost"
        else:
            run(command, out, resume=True)
        begun = log.read_text().split()
        assert list(dict.fromkeys(begun)) == CASES[command] and len(begun) <= len(CASES[command]) + kills, f"trial {trial}"
        assert result_of(command, out) == expected, f"trial {trial}"
        assert not journal_of(command, out).exists()


def kept_cases(command, out):
    journal = journal_of(command, out)
    return list(json.loads(journal.read_text())["cases"]) if journal.exists() else []


def dies_at(step, cut, write=MetricsLog.append):
    """An `append` that ends the process after the line of `step`, the last `cut` bytes of which are not on the disk."""

    def append(log, row):
        write(log, row)
        if row["step"] == step:
            os.truncate(log.path, log.path.stat().st_size - cut)
            os.kill(os.getpid(), signal.SIGKILL)

    return append


@POSIX
def test_a_training_killed_at_any_moment_goes_on_with_every_step_once_in_its_metrics(tmp_path, monkeypatch):
    """The checkpoint is that of the step before, so that the step whose line may be cut is taken again."""
    ten = ("--train-tokens", "320", "--eval-every", "0", "--out-dir")
    train(tmp_path, *ten, str(tmp_path / "whole"))  # the data and its tokens are in the cache then
    whole = [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "whole" / METRICS)]
    assert len(whole) == 10
    for number in range(max(4, KILLS // 20)):
        folder = tmp_path / f"killed {number}"
        with monkeypatch.context() as patched:
            patched.setattr(job, "SAVE_SECONDS", 0.0)
            patched.setattr(MetricsLog, "append", dies_at(2 + 4 * number % 9, cut=number % 2 * random.Random(number).randrange(1, 40)))
            assert os.WIFSIGNALED(killed_child(partial(train, tmp_path, *ten, str(folder))))
        assert train(tmp_path, *ten, str(folder)) == 0
        rows = read_metrics(folder / METRICS)
        assert [(row["step"], row["loss"]) for row in rows] == whole and {row["session"] for row in rows} == {1, 2}
