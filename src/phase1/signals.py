"""Signals that end a run: each is an interrupt, so that files are whole, what is finished is kept, and a line says so."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

ENDING: Final = tuple(number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None)
"""Ctrl-C, `kill` or the end of a job, and a terminal that closes; what the system has of them."""


class Ending:
    """Whether one of `ENDING` has `come`: a library's callback may raise another error in place of the interrupt."""

    def __init__(self) -> None:
        self.come = self.waits = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block a signal is only noted, and interrupts at its end: an exception while a library in C++ is imported
        would abort the process."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.come:
            raise KeyboardInterrupt


@contextmanager
def ending_signals_interrupt() -> Iterator[Ending]:
    """Within the block the first of `ENDING` raises KeyboardInterrupt, and a second one does what it did before the block.

    A signal that is ignored stays so, and a block outside the main thread changes nothing.
    """
    ending = Ending()
    before = handlers()

    def interrupt(number: int, frame: object) -> None:
        ending.come = True
        restore(before)
        forget_terminal(number)
        if not ending.waits:
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield ending
    finally:
        restore(before)


def handlers() -> dict[int, Any]:
    """What each of `ENDING` does now, without those that are ignored; nothing outside the main thread, which gets none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    known = {number: signal.getsignal(number) for number in ENDING}
    return {number: handler for number, handler in known.items() if handler not in (signal.SIG_IGN, None)}


def restore(before: dict[int, Any]) -> None:
    """Put `handlers` back."""
    for number, handler in before.items():
        signal.signal(number, handler)


def forget_terminal(number: int) -> None:
    """Where a signal says that the terminal is gone, send what is printed nowhere: a write to it would be an error."""
    if number != getattr(signal, "SIGHUP", None):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(standard).st_mode):
                os.dup2(null, standard)
    os.close(null)
