import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from phase1.measure.isolate import Outcome, is_out_of_memory, run_here, run_isolated

# The isolated functions are builtins: a fresh process can import them whatever the test runner's import mode.


def test_a_value_comes_back_from_another_process():
    outcome = run_isolated(os.getpid)
    assert outcome.status == "ok" and outcome.value not in (None, os.getpid())


def test_an_exception_is_an_error_with_its_type_and_one_line(capfd):
    outcome = run_isolated(int, "no\nnumber")
    assert outcome == Outcome("error", message=r"ValueError: invalid literal for int() with base 10: 'no\nnumber'")
    assert "Traceback" in capfd.readouterr().err


def test_running_out_of_memory_in_the_child_is_oom_and_the_parent_goes_on():
    assert run_isolated(bytes, 1 << 62).status == "oom"
    assert run_isolated(abs, -1) == Outcome("ok", 1)


def test_a_killed_child_is_recorded_with_its_signal():
    outcome = run_isolated(signal.raise_signal, signal.SIGKILL)
    assert outcome.status == "error" and "SIGKILL" in outcome.message and "memory" in outcome.message
    assert "SIGTERM" in run_isolated(signal.raise_signal, signal.SIGTERM).message


def test_a_child_that_exits_or_returns_what_cannot_be_sent_is_an_error(capfd):
    assert run_isolated(os._exit, 7).message == "the measuring process ended with exit code 7 and no result"
    assert run_isolated(threading.Lock).status == "error"


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
