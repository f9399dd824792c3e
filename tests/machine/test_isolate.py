import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from phase1.errors import is_out_of_memory
from phase1.machine import isolate
from phase1.machine.isolate import KILL_SECONDS, Outcome, run_here, run_isolated

pytestmark = pytest.mark.usefixtures("interrupts_arrive")  # children inherit who ignores what

# The isolated functions are builtins: a fresh process can import them whatever the test runner's import mode.


def test_a_value_comes_back_from_another_process():
    outcome = run_isolated(os.getpid)
    assert outcome.status == "ok" and outcome.value not in (None, os.getpid())


def test_an_exception_is_an_error_with_its_type_and_one_line(tmp_path):
    outcome = run_isolated(int, "no\nnumber")
    assert outcome == Outcome("error", message=r"ValueError: invalid literal for int() with base 10: 'no\nnumber'")
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.run([sys.executable, script, "1 / 0"], capture_output=True, text=True, env=environment())
    assert parent.returncode == 0 and parent.stderr.count("Traceback") == 1 and "ZeroDivisionError" in parent.stderr


def test_running_out_of_memory_in_the_child_is_oom_and_the_parent_goes_on():
    assert run_isolated(bytes, 1 << 62).status == "oom"
    assert run_isolated(abs, -1) == Outcome("ok", 1)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT", "SIGTERM", "SIGBUS"])
def test_a_killed_child_is_recorded_with_its_signal(name):
    outcome = run_isolated(signal.raise_signal, signal.Signals[name])
    assert outcome.status == "error" and name in outcome.message and ("memory" in outcome.message) == (name == "SIGKILL")


@pytest.mark.parametrize(
    "crash, name", [((ctypes.string_at, 0), "SIGSEGV"), ((os.abort,), "SIGABRT")], ids=["SIGSEGV", "abort"]
)
def test_a_crash_in_native_code_is_recorded_with_its_signal(crash, name):
    assert name in run_isolated(*crash).message


def test_a_child_that_exits_or_returns_what_cannot_be_sent_is_an_error():
    assert run_isolated(os._exit, 7).message == "the measuring process ended with exit code 7 and no result"
    assert run_isolated(threading.Lock).status == "error"


def test_a_value_larger_than_a_pipe_comes_back():
    assert run_isolated(bytes, 5_000_000, timeout_s=60).value == bytes(5_000_000)


def gone(pid):
    """Whether a process ends within KILL_SECONDS; one that nobody has waited for is a zombie."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


IGNORE_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
STOP = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
# a grandchild that writes its number to the file {path} and sleeps, then what the child does
WITH_GRANDCHILD = """
import os, time
number = os.fork()
if number == 0:
    time.sleep(60)
open({path!r}, "w").write(str(number))
"""


@pytest.mark.parametrize(
    "code",
    ["import time; time.sleep(60)", IGNORE_SIGTERM, STOP, "while True: pass"],
    ids=["sleeps", "ignores SIGTERM", "stopped", "spins"],
)
def test_a_child_that_hangs_is_killed_after_its_time_and_the_outcome_says_timeout(code):
    began = time.monotonic()
    outcome = run_isolated(exec, code, timeout_s=1.0)
    assert outcome.status == "error" and outcome.message.startswith("timeout: ") and "within 1 s" in outcome.message
    assert time.monotonic() - began < 1 + KILL_SECONDS and multiprocessing.active_children() == []


@pytest.mark.parametrize(
    "then, word",
    [("time.sleep(60)", "timeout"), ("os._exit(7)", "exit code 7"), ("os.abort()", "SIGABRT"), ("pass", "")],
    ids=["hangs", "exits", "crashes", "returns"],
)
def test_grandchildren_are_gone_however_the_child_ends(tmp_path, then, word):
    path = tmp_path / "pid"
    limit = 1.5 if word == "timeout" else 60  # on a busy machine the others may take longer than they should
    began = time.monotonic()
    outcome = run_isolated(exec, WITH_GRANDCHILD.format(path=str(path)) + then, timeout_s=limit)
    assert (outcome.status == "ok") == (then == "pass") and word in outcome.message
    assert time.monotonic() - began < 1.5 + KILL_SECONDS
    assert gone(int(path.read_text()))


PARENT = """
import sys
from phase1.machine.isolate import run_isolated
if __name__ == "__main__":
    run_isolated(exec, sys.argv[1])
"""


def environment():
    return os.environ | {"PYTHONPATH": str(Path(isolate.__file__).parents[2])}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_no_process_outlives_a_parent_that_is_ended(tmp_path, end):
    path, script = tmp_path / "pid", tmp_path / "parent.py"
    script.write_text(PARENT)
    code = WITH_GRANDCHILD.format(path=str(path)) + f"os.rename({str(path)!r}, {str(path) + '.whole'!r}); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, script, code], stderr=subprocess.DEVNULL, env=environment())
    whole = Path(f"{path}.whole")
    deadline = time.monotonic() + 30
    while not whole.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild = int(whole.read_text())
    child = int(Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[1])
    parent.send_signal(end)
    parent.wait(timeout=20)
    assert gone(child) and gone(grandchild)


def test_the_terminal_interrupts_the_parent_alone():
    assert run_isolated(os.getpgrp).value not in (None, os.getpgrp())


def test_an_interrupt_passes_and_kills_the_child():
    began = time.perf_counter()
    timer = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(time.sleep, 60)
    assert time.perf_counter() - began < 20
    timer.join()
    assert multiprocessing.active_children() == []


def test_an_interrupt_passes_through_run_here():
    with pytest.raises(KeyboardInterrupt):
        run_here(signal.raise_signal, signal.SIGINT)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_what_torch_says_when_memory_runs_out_is_recognised(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_running_out_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_tensors_of_a_failed_call_are_freed():
    import weakref

    alive = []

    def fails():
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        raise MemoryError

    assert run_here(fails).status == "oom"
    assert alive[0]() is None


HOLD = "import time, torch; x = torch.ones(2**28, device='cuda'); torch.cuda.synchronize(); open({path!r}, 'w').close(); time.sleep(99)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_what_a_hanging_child_held_is_free_after_its_time(tmp_path):
    path = tmp_path / "held"
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    outcome = run_isolated(exec, HOLD.format(path=str(path)), timeout_s=40)
    assert outcome.message.startswith("timeout") and path.exists()
    deadline = time.monotonic() + KILL_SECONDS
    while (missing := before - torch.cuda.mem_get_info()[0]) > 2**20 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert missing <= 2**20, "the next probe's baseline is within 1 MiB"
