"""Results that survive: a disk that fails at any call of a write."""

import errno
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from phase1.errors import error_line, exit_status
from phase1.files import append_text, atomic_write
from phase1.records import session
from phase1.records.schema import FILES
from tests.fake_runs import CASES, fake, journal_of, result_of, run
from tests.reports import assert_one_line, contents, make_tables, write_all

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

    def open_folder(path, flags, *mode):
        if flags & os.O_DIRECTORY:
            call("open folder")
        return real_os_open(path, flags, *mode)

    def close(handle):
        real_close(handle)
        if sys._getframe(1).f_code.co_name == "_sync_folder":
            call("close folder")

    real_open, real_close, real_os_open = Path.open, os.close, os.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_file)
        patch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
        patch.setattr(os, "fsync", counted("fsync", os.fsync))
        patch.setattr(os, "replace", counted("replace", os.replace))
        patch.setattr(os, "open", open_folder)
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


@pytest.mark.parametrize("write", [lambda path: atomic_write(path, b"new"), lambda path: append_text(path, "new")])
def test_an_error_that_knows_no_name_gets_that_of_the_file(tmp_path, monkeypatch, write):
    class Full:
        def __init__(self, path):
            self.path, self.fileno = path, lambda: 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda self, *args, **options: Full(self))
    with pytest.raises(OSError) as error:
        write(tmp_path / "a.json")
    assert error.value.filename == str(tmp_path / "a.json")
    line = error_line("train", error.value)
    assert exit_status(error.value) == 4 and f"'{tmp_path / 'a.json'}'; remove what is not needed from the disk of that path" in line


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_a_file_or_a_folder_gets_the_file_all_the_same(tmp_path, code):
    for fail_at in (i for i, name in enumerate(CALLS) if name == "fsync"):
        with failing_disk(fail_at, code):
            atomic_write(tmp_path / "a.json", b"new %d" % fail_at)
        assert (tmp_path / "a.json").read_bytes() == b"new %d" % fail_at


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_command_whose_disk_fails_exits_4_with_one_line_and_every_table_is_the_old_or_the_new_one(tmp_path, capsys, code):
    results = write_all(tmp_path / "in")
    out = results.parent / "out"
    sets = []
    for hardware in ("new", "old"):
        assert make_tables(results, "--hardware", hardware, "--formats", "csv") == 0
        sets.append(contents(out))
    new, old = sets
    capsys.readouterr()
    for fail_at in range(len(CALLS) * len(new)):
        with failing_disk(fail_at, code):
            assert make_tables(results, "--hardware", "new", "--formats", "csv") == 4
        assert_one_line(capsys.readouterr().err)
        now = contents(out)
        assert now.keys() == old.keys()
        assert all(data in (old[name], new[name]) for name, data in now.items())
        assert fail_at > CALLS.index("replace") or now == old


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("command", CASES)
def test_a_run_whose_disk_fails_at_any_call_exits_4_with_one_line_and_resumes_with_at_most_one_case_redone(
    tmp_path, monkeypatch, capsys, command, code
):
    log = tmp_path / "begun"
    fake(monkeypatch, log)
    monkeypatch.setattr(session, "require_writable", lambda folder: None)  # what it tries is tests/records/test_session.py's
    run(command, tmp_path / "whole")
    writes = len(CASES[command]) + 1  # a journal for every case, and the report
    for fail_at in range(0, len(CALLS) * writes, 1 if (command, code) == ("memory", errno.ENOSPC) else 7):
        out = tmp_path / f"{fail_at}"
        log.write_text("")
        capsys.readouterr()
        with failing_disk(fail_at, code):
            assert exit_of(command, out) == 4, fail_at
        assert_one_line(capsys.readouterr().err)
        finished = fail_at // len(CALLS)  # cases whose write had succeeded
        kept = list(json.loads(journal_of(command, out).read_text())["cases"]) if journal_of(command, out).exists() else []
        renamed = fail_at % len(CALLS) > CALLS.index("replace") and finished < len(CASES[command])
        assert kept == CASES[command][: finished + renamed]
        run(command, out, resume=True)
        assert len(log.read_text().split()) <= len(CASES[command]) + 1
        assert result_of(command, out) == result_of(command, tmp_path / "whole")
        assert [path.name for path in out.iterdir()] == [FILES[command]]


def exit_of(command, out):
    """What the command line would exit with."""
    try:
        return run(command, out)
    except OSError as error:
        print(error_line(command, error), file=sys.stderr)
        return exit_status(error)
