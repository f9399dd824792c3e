"""Results that survive: processes killed at any moment, disks that fail at any call, files damaged in any way.

The environment variable PHASE1_TORTURE is the number of SIGKILLs at random moments; `make torture` sets 1,000.
"""

import copy
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from phase1.checkpoint import INDEX, load_model, resume, save_checkpoint
from phase1.cli import main
from phase1.files import atomic_write
from phase1.record import FILES, read_report, write_report
from phase1.train import train_step
from tests.reports import all_reports, memory_report
from tests.test_train import as_tensors, batch_at, state

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "results" / "h100"
KILLS = int(os.environ.get("PHASE1_TORTURE", "60"))
CHECKPOINT_KILLS = max(4, KILLS // 20)
CASES = 5400  # damaged result files
SECONDS = 1.0  # of processor time that a refusal may take
POSIX = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")


# Killed at any moment ---------------------------------------------------------------------------------------------

# argv: path, first number, k to die at the k-th line that runs in files.py (0: wait for the signal), folder of reports.
# Prints the number of each report once its write has returned.
WRITER = """
import itertools, os, signal, sys
from phase1 import files
from phase1.record import FILES, read_report, write_report

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
from phase1.checkpoint import save_checkpoint
from phase1.train import train_step
from tests.test_train import as_tensors, batch_at, state

s = state()
train_step(s, as_tensors(batch_at(0), 4))
for s.step in itertools.count(int(sys.argv[2])):
    with torch.no_grad():
        for p in s.model.parameters():
            p.fill_(s.step)
            s.optimizer.state[p]["exp_avg"].fill_(s.step)
    save_checkpoint(sys.argv[1], s, {"step": s.step}, resumable=s.step % 2 == 0)
    os.write(1, b"%d\\n" % s.step)
"""


def last_confirmed(program, path, number, seconds, moment=0):
    """Run `program` from `number` on, kill it `seconds` after its first write; the last number that it confirmed."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(number), str(moment), str(MEASURED)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
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
    write_report(memory_report(run={"number": number + number % 2}), path)
    assert number_of(path) == number + number % 2


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
            assert all((values["exp_avg"] == again.step).all() for values in again.optimizer.state.values())
        number = facts["step"] + 2
    last = state()
    last.step = number
    save_checkpoint(tmp_path, last, {"step": number})
    seen = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert seen == [INDEX, f"model-{number:08d}.safetensors", f"training-{number:08d}.safetensors"]


# Disks that fail at any call --------------------------------------------------------------------------------------

CALLS = ["mkdir", "open", "write", "flush", "fsync", "close", "replace", "open folder", "fsync", "close folder"]
CODES = [errno.ENOSPC, errno.EIO, errno.EACCES]


class FailingFile:
    """A file whose calls are counted; a write that fails has written half, as on a full disk."""

    def __init__(self, file, call):
        self.file, self.call, self.fileno = file, call, file.fileno

    def write(self, data):
        self.call("write", lambda: self.file.write(data[: len(data) // 2]))
        return self.file.write(data)

    def flush(self):
        self.call("flush")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
        self.call("close")


@contextmanager
def failing_disk(fail_at, code):
    """Call number `fail_at` of those that atomic_write makes to the disk raises OSError; yields the names of the calls."""
    calls = []

    def call(name, before=lambda: None):
        calls.append(name)
        if len(calls) - 1 == fail_at:
            before()
            raise OSError(code, os.strerror(code), "result\n.json")

    def counted(name, real):
        return lambda *args, **options: (call(name), real(*args, **options))[1]

    def open_file(path, mode="r", *args, **options):
        if mode != "xb":
            return real_open(path, mode, *args, **options)
        call("open")
        return FailingFile(real_open(path, mode, *args, **options), call)

    def close(handle):
        real_close(handle)
        if sys._getframe(1).f_code.co_name == "_sync_folder":
            call("close folder")

    real_open, real_close = Path.open, os.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_file)
        patch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
        patch.setattr(os, "fsync", counted("fsync", os.fsync))
        patch.setattr(os, "replace", counted("replace", os.replace))
        patch.setattr(os, "open", counted("open folder", os.open))
        patch.setattr(os, "close", close)
        yield calls


def test_the_calls_that_can_fail_are_all_that_a_write_makes(tmp_path):
    with failing_disk(None, 0) as calls:
        atomic_write(tmp_path / "a.json", b"new")
    assert calls == CALLS


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("fail_at", range(len(CALLS)), ids=lambda i: f"{i}-{CALLS[i]}")
def test_a_disk_that_fails_at_any_call_leaves_a_whole_file_and_no_other(tmp_path, fail_at, code):
    path = tmp_path / "a.json"
    atomic_write(path, b"old")
    with failing_disk(fail_at, code), pytest.raises(OSError) as error:
        atomic_write(path, b"new content")
    assert error.value.errno == code
    assert path.read_bytes() == (b"old" if fail_at <= CALLS.index("replace") else b"new content")
    assert os.listdir(tmp_path) == ["a.json"]
    atomic_write(path, b"third")
    assert path.read_bytes() == b"third"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def results(tmp_path):
    for kind, report in all_reports().items():
        write_report(report, tmp_path / "in" / FILES[kind])
    return tmp_path / "in"


def tables(results, *flags):
    """Exit code of `phase1 tables`; the tables go to a folder beside the results."""
    return main(["tables", "--results-dir", str(results), "--out-dir", str(results.parent / "out"), *flags])


def assert_one_line(text):
    assert text.endswith("\n") and text[:-1].isprintable(), text


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_command_whose_disk_fails_exits_4_with_one_line_and_every_table_is_the_old_or_the_new_one(results, capsys, code):
    out = results.parent / "out"
    sets = []
    for hardware in ("new", "old"):
        assert tables(results, "--hardware", hardware, "--formats", "csv") == 0
        sets.append(contents(out))
    new, old = sets
    capsys.readouterr()
    for fail_at in range(len(CALLS) * len(new)):
        with failing_disk(fail_at, code):
            assert tables(results, "--hardware", "new", "--formats", "csv") == 4
        assert_one_line(capsys.readouterr().err)
        now = contents(out)
        assert now.keys() == old.keys()
        assert all(data in (old[name], new[name]) for name, data in now.items())
        assert fail_at > CALLS.index("replace") or now == old


# Files damaged in any way -----------------------------------------------------------------------------------------


def places(value, path=()):
    """Every place in a JSON value but the root."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


MARK = "put the literal here"
LITERALS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "5e-324", "-0", "-1", "0", "0.5", "01", "+1", "0x10", ".5", "1.",
    "9" * 19, "9" * 400, "9" * 4000, "-" + "9" * 5000, "1" + "0" * 308, "null", "true", "None", "'x'", '""', '"x"', '"\\ud800"',
    '"\\u001b[2J\\n"', '"\x1b[31m"', '"\u2028\u202e\u0085"', '"' + "x" * 5000 + '"', "[]", "{}", "[[]]", '{"a": 1}', "[1, 2]",
    '{"a": 1, "a": 2}', '{"\x1b]0;x\x07": 1}', '{"\\n": 1, "\\n": 2}', "", ",", "}", "//", "/* */ 1",
]  # fmt: skip
DEPTHS = (50, 200, 400, 600, 800, 900, 950, 1000, 2000, 10_000, 100_000)
FOREIGN = [
    b"", b" ", b"\n", b"null", b"[]", b"{}", b"3", b'"x"', b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"\x00" * 100, b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n", b"<html></html>", b"a,b\n1,2\n", b'{"name": "x", "version": "1.0"}', b'{"schema_version": 1}',
    b'{"schema_version": 2, "kind": "memory"}', b'{"schema_version": 1e400, "kind": "memory"}', b'{"kind": []}',
    b'{"schema_version": 1, "kind": "memory"}', b'{"schema_version": 1, "kind": {}, "results": []}', b"{}{}", b"{} x",
    b'{"cells": [], "nbformat": 4}', b"---\na: 1\n", b"\x80\x04\x95.", b"{" * 100_000, b'{"a":' * 100_000, b"[" * 100_000,
    b"{" + b",".join(b'"k%d": 1' % i for i in range(30_000)) + b', "k29999": 2}',
    b'{"schema_version": ' + b"9" * 4000 + b', "kind": "memory"}',
]  # fmt: skip


def literal(rng):
    """A JSON literal, or what some program takes for one; one in eight is deep."""
    if rng.random() > 0.125:
        return rng.choice(LITERALS)
    depth, (opening, closing) = rng.choice(DEPTHS), rng.choice([("[", "]"), ('{"a":', "}")])
    return opening * depth + "0" + closing * (depth if rng.random() < 0.8 else 0)


def replaced(rng, content):
    """Another literal somewhere: wrong types, huge and non-finite numbers, deep nesting, hostile text, broken JSON."""
    content = copy.deepcopy(content)
    *parents, last = rng.choice(list(places(content)))
    target = content
    for key in parents:
        target = target[key]
    target[last] = MARK
    return json.dumps(content).replace(json.dumps(MARK), literal(rng)).encode()


def renamed(rng, content):
    """A key left out, added, renamed or given twice."""
    content = copy.deepcopy(content)
    objects = [
        content,
        *(item for item in map(lambda path: at(content, path), places(content)) if isinstance(item, dict) and item),
    ]
    target = rng.choice(objects)
    key = rng.choice(list(target))
    new = rng.choice(["x", "", "\x1b[2J", "a\nb", "__class__", "results", "schema_version", "x" * 9000, "é", key])
    if rng.random() < 0.5:
        target[new] = target.pop(key)
        return json.dumps(content, ensure_ascii=rng.random() < 0.5).encode()
    target[MARK] = rng.choice([1, None, [], {}])
    return json.dumps(content).replace(json.dumps(MARK), json.dumps(new)).encode()


def at(content, path):
    for key in path:
        content = content[key]
    return content


def cut(rng, data):
    """Cut anywhere, or right at, before or behind a character that means something to JSON."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    sign = rng.choice(b'{}[]",:\n0')
    ends = [i for i, byte in enumerate(data) if byte == sign] or [0]
    end = max(0, rng.choice(ends) + rng.choice([-1, 0, 1]))
    return rng.choice([data[:end], data[end:]])


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def spliced(rng, data):
    """Bytes deleted, doubled, zeroed (as after a crash of a file system) or strange ones put in."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 1, 2, 10, 512, 4096]))
    middle = [
        b"",
        b"",
        data[start:end] * 2,
        b"\0" * (end - start),
        rng.randbytes(4),
        b"\x1b[2J",
        b"\xed\xa0\x80",
        b"\r\n",
        b"NaN",
    ]
    return data[:start] + rng.choice(middle) + data[end:]


def damaged(rng, reports):
    """One damaged file: (what was done, bytes, the kind it is read as)."""
    kind, data, content = rng.choice(reports)
    how = rng.choice(["replaced", "replaced", "replaced", "renamed", "cut", "flipped", "spliced", "foreign"])
    if how in ("replaced", "renamed"):
        data = globals()[how](rng, content)
    elif how == "foreign":
        data = rng.choice([*FOREIGN, rng.randbytes(rng.randrange(300))])
    else:
        data = globals()[how](rng, data)
    if rng.random() < 0.02:  # one in fifty is damaged twice
        data = cut(rng, data or b"{")
    return how, data, kind if rng.random() < 0.95 else rng.choice(list(FILES))


def real_reports():
    """The reports of the tests and the measured ones, as (kind, bytes, JSON)."""
    texts = [(kind, report.model_dump_json(indent=2).encode()) for kind, report in all_reports().items()]
    texts += [(kind, (MEASURED / name).read_bytes()) for kind, name in FILES.items()]
    return [(kind, data, json.loads(data)) for kind, data in texts]


def test_a_result_file_damaged_in_any_way_is_read_as_a_valid_one_or_refused_at_once_in_one_line(tmp_path):
    rng, reports, path = random.Random(3), real_reports(), tmp_path / "a.json"
    assert all(len(json.dumps(content)) > 1000 for _, _, content in reports)
    refused = dict.fromkeys(["replaced", "renamed", "cut", "flipped", "spliced", "foreign"], 0)
    for case in itertools.count():
        if case == CASES:
            break
        how, data, kind = damaged(rng, reports)
        path.write_bytes(data)
        start = time.process_time()
        try:
            report = read_report(path, kind)
        except ValueError as error:
            refused[how] += 1
            message = str(error)
            assert message.isprintable() and message.startswith(f"{path}: expected ") and len(message) < 1000, (
                case,
                how,
                message,
            )
        else:
            assert report.kind == kind
            json.dumps(report.model_dump(), allow_nan=False)
        assert time.process_time() - start < SECONDS, (case, how)
    assert all(count > CASES / 100 for count in refused.values()), refused
    assert sum(refused.values()) < CASES  # and some damage is only another valid report


@pytest.mark.parametrize("how", ["no JSON", "wrong types"])
def test_tables_of_a_damaged_file_exit_2_with_one_line_and_leave_the_old_ones(results, capsys, monkeypatch, how):
    rng, out = random.Random(how), results.parent / "out"
    assert tables(results) == 0
    before = contents(out)
    capsys.readouterr()
    refused = 0
    for case in range(60):
        kind, report = rng.choice(list(all_reports().items()))
        content = json.loads(report.model_dump_json())
        good = (results / FILES[kind]).read_bytes()
        bad = cut(rng, good)[:-2] if how == "no JSON" else replaced(rng, content)
        (results / FILES[kind]).write_bytes(bad)
        code = tables(results)
        printed = capsys.readouterr()
        if code == 0:  # damage that makes another valid report
            assert how != "no JSON" and read_report(results / FILES[kind], kind)
            (results / FILES[kind]).write_bytes(good)
            assert tables(results) == 0
            capsys.readouterr()
        else:
            refused += 1
            assert code == 2, case
            assert_one_line(printed.err)
            (results / FILES[kind]).write_bytes(good)
        assert contents(out) == before
    assert refused >= 30


@pytest.mark.parametrize("number", [10**30, 10**307, 10**400, 10**4200], ids=lambda n: f"{len(str(n)) - 1} digits")
def test_numbers_that_no_measurement_has_end_in_tables_or_in_one_line(results, capsys, number):
    for kind, report in all_reports().items():
        content, path = json.loads(report.model_dump_json()), results / FILES[kind]
        good = path.read_bytes()
        for place in places(content):
            if type(at(content, place)) is not int:
                continue
            changed = copy.deepcopy(content)
            at(changed, place[:-1])[place[-1]] = number
            path.write_text(json.dumps(changed))
            code = tables(results, "--formats", "csv")
            printed = capsys.readouterr()
            assert code in (0, 2), place
            assert code == 0 or not assert_one_line(printed.err)
        path.write_bytes(good)


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    rng, saved = random.Random(4), state()
    train_step(saved, as_tensors(batch_at(0), 4))
    save_checkpoint(tmp_path, saved, {})
    again = state()
    for path in sorted(tmp_path.iterdir()):
        good = path.read_bytes()
        damages = [cut, flipped, spliced, lambda rng, data: b""]
        if path.name == INDEX:
            damages += [lambda rng, data: renamed(rng, json.loads(data))] * 2
        refused = 0
        for case, damage in enumerate(damages * 12):
            path.write_bytes(damage(rng, good))
            for read in (load_model, lambda folder: resume(folder, again)):
                try:
                    read(tmp_path)
                except ValueError as error:
                    refused += 1
                    assert str(error).isprintable(), (path.name, case)
        assert refused >= 24
        path.write_bytes(good)
    load_model(tmp_path)
    resume(tmp_path, state())
