"""The errors that are not the user's mistake, what an error says, and the exit status of every kind of failure."""

from phase1.text import one_line, without_private


class Unavailable(RuntimeError):
    """A data set, a device or a measurement cannot be had on this machine; commands exit 3 with its one line."""


class Diverged(Unavailable):
    """A training whose loss is no longer a finite number."""


FAILURES: dict[type[Exception], int] = {ValueError: 2, Unavailable: 3, OSError: 4}
"""Expected failures of a command, each one line on stderr, and their exit status."""


def error_line(command: str, error: Exception) -> str:
    """What stderr gets for an expected failure: one line, whatever names of files and data sets are in it."""
    remedy = "; check that path and the free space there" if isinstance(error, OSError) else ""
    return one_line(f"phase1 {command}: error: {error}{remedy}", 2000)


def exit_status(error: Exception) -> int:
    """The exit status of an expected failure."""
    return next(code for kind, code in FAILURES.items() if isinstance(error, kind))


# what PyTorch says, other than torch.OutOfMemoryError, when memory runs out
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of the GPU or of the machine, ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def reason(error: BaseException) -> str:
    """What `error` says, on one line without what is private; its type where it says nothing."""
    return without_private(" ".join(str(error).split()))[:600] or type(error).__name__
