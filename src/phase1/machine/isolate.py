"""Run a function and return how it ended: a value, out of memory, an exception or a signal."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Literal, TypeVar

from phase1.errors import Elsewhere, is_out_of_memory, reason

T = TypeVar("T")

KILL_SECONDS = 5.0  # time that a killed process has to disappear
POLL_SECONDS = 0.1  # between looks at a silent process


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How a call ended. `value` is there when status is ok; otherwise `message` is one line that says why.

    What is out of memory only by a limit may have a value too: what was found before the limit was looked at.
    """

    status: Literal["ok", "oom", "error"]
    value: T | None = None
    message: str = ""


def run_here(function: Callable[..., T], *args: Any) -> Outcome[T]:
    """Call `function(*args)` in this process; the traceback of an unexpected error goes to stderr.

    The frames of a failed call, and the tensors they hold, are gone when this returns. KeyboardInterrupt passes.
    """
    try:
        return Outcome("ok", function(*args))
    except Elsewhere as error:
        return Outcome("error", message=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome("oom", message=reason(error))
        traceback.print_exc()
        return Outcome("error", message=f"{type(error).__name__}: {reason(error)}")


def run_isolated(function: Callable[..., T], *args: Any, timeout_s: float | None = None) -> Outcome[T]:
    """Call `function(*args)` in a process of its own, so that memory peaks are its own and a crash harms nobody.

    A fork server that has imported the module of `function` starts it, so that only the first call waits for imports; where a
    system has none, the process is spawned. The process leads a group of its own. However the call ends (with a value, a
    crash, after `timeout_s` seconds, by an interrupt, or because this process is killed), every process of that group is gone
    within KILL_SECONDS.

    `function`, its arguments and its value are pickled, over a pipe between the two; the caller's main module must be
    importable (a guard `if __name__ == "__main__"` in scripts).
    """
    context = _context(function.__module__)
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, function, args))
    process.start()
    theirs.close()  # the child holds the only other end: its death is an end of file here
    try:
        outcome: Outcome[T] | None = _answer(ours, process, timeout_s)
        _wait(process)  # it may clean up at its end, but not for ever
        return Outcome("error", message=_death(process.exitcode)) if outcome is None else outcome
    except TimeoutError:
        message = f"timeout: the measuring process gave no result within {timeout_s:g} s and was killed; try smaller sizes"
        return Outcome("error", message=message)
    finally:
        _end(process)
        ours.close()


def _context(module: str) -> Any:
    # not "fork": a child of this process would inherit its CUDA context, and could not use it
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])  # heeded by the first call, which starts the server
    return context


def _answer(pipe: Connection, process: BaseProcess, timeout_s: float | None) -> Outcome[Any] | None:
    """What the child sends; None if it ends without. Raises TimeoutError if it is silent for `timeout_s`."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        alive = process.is_alive()  # before the look at the pipe: what a dead child has sent is all there
        try:
            # a grandchild may hold the pipe open, so that the child's death is no end of file: look at both
            if pipe.poll(POLL_SECONDS if alive else 0):
                return pipe.recv()
        except (EOFError, ConnectionError):
            return None
        if not alive:
            return None
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError


def _wait(process: BaseProcess) -> None:
    """Like `process.join(KILL_SECONDS)`, which waits for grandchildren too: they hold the pipe that it looks at."""
    deadline = time.monotonic() + KILL_SECONDS
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def _end(process: BaseProcess) -> None:
    """Kill the child's process group: the child if it still runs, and every process that it started."""
    if process.pid is not None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left; the child has not got its group yet
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    _wait(process)


def _child(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which kills this whole group
        threading.Thread(target=_die_with_parent, args=(pipe,), daemon=True).start()
    pipe.send(run_here(function, *args))


def _die_with_parent(pipe: Connection) -> None:
    """The parent sends nothing: what can be read is the end of file that its death leaves."""
    with contextlib.suppress(OSError):
        pipe.poll(None)
    os.killpg(0, signal.SIGKILL)


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the measuring process was ended by {name}{hint}"
    return f"the measuring process ended with exit code {exitcode} and no result"
