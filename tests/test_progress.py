"""Bars on a terminal, and lines elsewhere, for work that takes longer than a moment."""

import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest

import phase1.progress as module
from phase1.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def use(file):
        monkeypatch.setattr(sys, "stderr", file)
        return file

    return use


def test_without_a_terminal_long_work_prints_whole_lines(stderr, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    file = stderr(io.StringIO())
    with progress(["a", "b", "c"], desc="memory", unit="model") as bar:
        for name in bar:
            bar.set_postfix_str(f"größe {name}")
    lines = file.getvalue().splitlines()
    assert lines and "\r" not in file.getvalue() and file.getvalue().isascii()
    assert all(re.fullmatch(r"memory: +\d/3 model \[.*\]", line) for line in lines)
    assert lines[-1].startswith("memory: 3/3 model") and "c" in lines[-1]


def test_work_of_unknown_length_counts(stderr, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    file = stderr(io.StringIO())
    with progress(desc="fit", unit="probe") as bar:
        for _ in range(4):
            bar.update()
    assert file.getvalue().splitlines()[-1].startswith("fit: 4 probe [") and "None" not in file.getvalue()


def test_short_work_prints_nothing_without_a_terminal(stderr):
    file = stderr(io.StringIO())
    for _ in progress(range(5), desc="fit", unit="probe"):
        pass
    assert file.getvalue() == ""


@pytest.mark.parametrize("file", [Terminal(), io.StringIO()])
def test_a_disabled_one_is_silent_everywhere(stderr, file):
    assert list(progress(range(3), desc="evaluate", disable=True)) == [0, 1, 2] and stderr(file).getvalue() == ""


def test_a_terminal_gets_a_bar(stderr):
    file = stderr(Terminal())
    assert list(progress(range(3), desc="memory", unit="model")) == [0, 1, 2]
    assert "\r" in file.getvalue() and "100%" in file.getvalue()


def test_every_bar_of_the_program_is_one_of_these():
    for path in Path(module.__file__).parent.rglob("*.py"):
        made = "tqdm(" in path.read_text()
        assert not made or path.name == "progress.py", path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_that_is_killed_in_the_middle_of_a_bar_does_not_stop_the_bars_of_others():
    child = os.fork()
    if not child:
        module.Bar.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert module.Bar.get_lock().acquire(timeout=5)
    module.Bar.get_lock().release()
