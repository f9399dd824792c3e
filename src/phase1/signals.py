"""Turn every signal that ends a run into KeyboardInterrupt, so that files stay whole and finished work is kept."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

ENDING: Final = tuple(number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None)
"""Signals of Ctrl-C, of `kill` or the end of a job, and of a closing terminal, as far as the system has them."""


class Ending:
    """`come`: whether a signal of `ENDING` has arrived, because a library may turn the interrupt into another error."""

    def __init__(self) -> None:
        self.come = self.waits = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Delay the interrupt to the end of the block: an exception during the import of a C++ library aborts the process."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.come:
            raise KeyboardInterrupt


@contextmanager
def ending_signals_interrupt() -> Iterator[Ending]:
    """Raise KeyboardInterrupt at the first signal of `ENDING` within the block; a second one acts as it did before the block.

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
    """The present handlers of `ENDING`, without ignored signals; empty outside the main thread, which gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    known = {number: signal.getsignal(number) for number in ENDING}
    return {number: handler for number, handler in known.items() if handler not in (signal.SIG_IGN, None)}


def restore(before: dict[int, Any]) -> None:
    """Reinstall the handlers that `handlers` returned."""
    for number, handler in before.items():
        signal.signal(number, handler)


def forget_terminal(number: int) -> None:
    """If the signal means that the terminal is gone, redirect what is printed to nowhere: writing to it would fail."""
    if number != getattr(signal, "SIGHUP", None):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(standard).st_mode):
                os.dup2(null, standard)
    os.close(null)
