import ast
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phase1 import files
from phase1.files import MAX_JSON_BYTES, alone_in, atomic_write, read_json
from phase1.text import one_line


def test_a_written_file_has_the_new_content_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    for content in (b"old", b"new"):
        atomic_write(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch, call, code):
    path = tmp_path / "a.json"
    atomic_write(path, b"old")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a.json", b"new")
    assert os.listdir(tmp_path) == []


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    atomic_write(tmp_path / "a.json", b"x")
    assert calls == ["fsync", "replace", "fsync"]


BAD = {
    "a part": b'{"a": ',
    "NaN": b'{"a": NaN}',
    "infinity": b"[-Infinity]",
    "a number too large": b"[1e999]",
    "an endless integer": b"9" * 5000,
    "a key twice": b'{"a": {"b": 1, "b": 1}}',
    "deep nesting": b"[" * 100_000,
    "bad UTF-8": b'"\xff"',
    "half a surrogate pair": b'"\\ud800"',
    "an empty file": b"",
    "a huge file": b" " * (MAX_JSON_BYTES + 1),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_what_is_no_strict_json_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert one_line(error.value) == str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(ValueError, match="no readable file"):
            read_json(path)


def test_strict_json_is_read_as_it_is(tmp_path):
    content = {"a": [1, 2.5, None, True, "é\n"], "b": {}}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert read_json(path) == content


def test_one_line_has_neither_line_breaks_nor_terminal_escapes():
    assert one_line("a\nb\x1b[31mc\u2028d\u202e") == "a?b?[31mc?d?"
    assert len(one_line("x" * 1000)) == 300


def test_nothing_else_in_the_package_opens_a_file_for_writing():
    package = Path(files.__file__).parent
    writers = {"write_text", "write_bytes", "savefig", "save_file", "to_csv", "dump", "savetxt", "touch"}
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
                writes = name == "open" and any(
                    isinstance(mode, str) and re.fullmatch(r"[rwxabt+]*[wxa+][bt+]*", mode) for mode in modes
                )
                found += [path.name] if writes or name in writers else []
    assert set(found) == {"files.py"}


def test_what_killed_writers_of_this_machine_left_is_removed_by_the_next_write_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine, ours = files._machine(), os.getpid()
    other = "0" * 8 if machine != "0" * 8 else "1" * 8
    stay = [f".a.json.{machine}-{ours:x}-abcdef.tmp", f".a.json.{other}-{dead.pid:x}-abcdef.tmp", ".a.json.0123456789ab.tmp", "x.tmp", ".x.tmp"]
    for name in (*stay, f".a.json.{machine}-{dead.pid:x}-abcdef.tmp", f".b-00000001.safetensors.{machine}-{dead.pid:x}-012345.tmp"):
        (tmp_path / name).write_bytes(b"half")
    atomic_write(tmp_path / "c.json", b"{}")
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, "c.json"])


@pytest.mark.parametrize("read", [files.open_plain, read_json])
def test_what_is_no_plain_file_is_named(tmp_path, read):
    with pytest.raises((OSError, ValueError), match="no plain file"):
        read(tmp_path)
    if Path("/dev/zero").exists():
        with pytest.raises((OSError, ValueError), match="no plain file"):
            read("/dev/zero")


def test_a_folder_is_held_by_one_at_a_time_and_nothing_is_left_in_it(tmp_path):
    refused = pytest.raises(ValueError, match="expected no other training in it; got one that is running")
    with alone_in(tmp_path), refused, alone_in(tmp_path):
        pass
    with alone_in(tmp_path), alone_in(tmp_path / "missing"):
        assert os.listdir(tmp_path) == []
