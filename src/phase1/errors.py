"""Errors that are not the user's mistake, their messages, and the exit status of every kind of failure."""

import dis
import errno
import sys
import traceback
from contextlib import suppress

from phase1 import world
from phase1.text import one_line, without_private


class Unavailable(RuntimeError):
    """A data set, a device or a measurement is not available on this machine; the command prints one line and exits with 3."""


class Elsewhere(Unavailable):
    """Another process of the same run failed, and says so itself: this one has nothing to say."""


class Gone(Unavailable):
    """Another process of the same run ended without a word: this one says so for it."""


class Diverged(RuntimeError):
    """A training whose loss or weights are no longer finite numbers: it ran as told, and has no result."""


FAILURES: dict[type[Exception], int] = {ValueError: 2, Unavailable: 3, Diverged: 3, OSError: 4}
"""Expected failures of a command, each one line on stderr, and their exit status."""
INTERNAL = 5  # exit status of every other failure: a fault of this program, or of a module that a user plugs in


def exit_status(error: Exception) -> int:
    """The exit status of a failure. A ValueError is the user's mistake where this package raised it, no library."""
    if is_out_of_memory(error):
        return FAILURES[Unavailable]
    if isinstance(error, ValueError) and not _raised_here(error):
        return INTERNAL
    return next((code for kind, code in FAILURES.items() if isinstance(error, kind)), INTERNAL)


def error_line(command: str, error: Exception) -> str:
    """What stderr gets for a failure: one line, whatever names of files and data sets are in it."""
    if exit_status(error) == INTERNAL:
        what = f"internal error: {type(error).__name__}: {reason(error)}; report it with the lines above and `phase1 doctor`"
    else:
        remedy = "; check that path and the free space there" if isinstance(error, OSError) else ""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "; remove what is not needed from the disk of that path, then run the command again"
        if isinstance(error, FileExistsError | NotADirectoryError):
            remedy = "; a file is there, where a folder should be: give another"
        what = f"error: {reason(error) if is_out_of_memory(error) else error}{remedy}"
    return one_line(f"phase1 {command}: {what}", 2000)


def report_failure(command: str, error: Exception) -> int:
    """Print a failure on stderr, with the traceback if it is unexpected, and return the exit status."""
    status = exit_status(error)
    if isinstance(error, Elsewhere):
        return status
    who = "" if isinstance(error, Gone) else world.name()
    with suppress(OSError):  # nothing can be said where standard error is full
        if status == INTERNAL:
            traceback.print_exception(error)
        print(error_line(command + who, error), file=sys.stderr, flush=True)
    return status


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` statement of this package raised `error`, and not a library or a C function that it called."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    module = str(last.tb_frame.f_globals.get("__name__", ""))
    return raised and module.partition(".")[0] == __name__.partition(".")[0]


# messages of PyTorch's other errors that mean out of memory
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of the GPU or of the machine, ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def reason(error: BaseException) -> str:
    """The message of `error` as one line without anything private; the error's type if the message is empty."""
    return without_private(" ".join(str(error).split()))[:600] or type(error).__name__
