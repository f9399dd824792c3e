"""Run a function so that however it ends is an answer: a value, out of memory, an exception or a signal."""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, Literal, TypeVar

from phase1.measure.environment import without_private

T = TypeVar("T")

# what PyTorch says, other than torch.OutOfMemoryError, when memory runs out
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How a call ended. `value` is there when status is ok; otherwise `message` is one line that says why."""

    status: Literal["ok", "oom", "error"]
    value: T | None = None
    message: str = ""


def run_here(function: Callable[..., T], *args: Any) -> Outcome[T]:
    """Call `function(*args)` in this process; the traceback of an unexpected error goes to stderr.

    The frames of a failed call, and the tensors they hold, are gone when this returns. KeyboardInterrupt passes.
    """
    try:
        return Outcome("ok", function(*args))
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome("oom", message=reason(error))
        traceback.print_exc()
        return Outcome("error", message=f"{type(error).__name__}: {reason(error)}")


def run_isolated(function: Callable[..., T], *args: Any) -> Outcome[T]:
    """Call `function(*args)` in a fresh process, so that memory peaks are its own and a crash harms nobody.

    `function`, its arguments and its value are pickled; the caller's main module must be importable (a guard
    `if __name__ == "__main__"` in scripts). The process is killed when this is interrupted.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA context, and could not use it
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args))
    process.start()
    sender.close()  # the child holds the only other end: its death is an end of file here
    try:
        outcome: Outcome[T] = receiver.recv()
        process.join()
        return outcome
    except EOFError:
        process.join()
        return Outcome("error", message=_death(process.exitcode))
    except BaseException:
        process.kill()
        process.join()
        raise
    finally:
        receiver.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of the GPU or of the machine, ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _child(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send(run_here(function, *args))
    except KeyboardInterrupt:  # Ctrl-C reaches the whole process group; the parent reports it
        sys.exit(128 + signal.SIGINT)


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the measuring process was ended by {name}{hint}"
    return f"the measuring process ended with exit code {exitcode} and no result"


def reason(error: BaseException) -> str:
    """What `error` says, on one line without what is private; its type where it says nothing."""
    return without_private(" ".join(str(error).split()))[:600] or type(error).__name__
