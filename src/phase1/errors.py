"""The error that is not the user's mistake, and the exit status of every kind of failure."""

from phase1.files import one_line


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
