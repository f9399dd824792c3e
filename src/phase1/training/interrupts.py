"""Delay interrupts to a moment at which nothing is lost."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from phase1.signals import forget_terminal, handlers, restore
from phase1.world import is_first, size

TOGETHER = b"\ninterrupted: all ranks end after this step, with a checkpoint, if none is gone\n"
NOTICE = b"\ninterrupted: ends after this step, with a checkpoint; once more to end at once\n"


@contextmanager
def interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM or SIGHUP is held until the end of the block, which then raises KeyboardInterrupt; a second acts at once.

    Yields a function that says whether one has come, for a loop that can end early. A signal that is ignored stays so, and
    a block outside the main thread holds nothing, since it receives nothing.
    """
    came = False
    before = handlers()

    def hold(number: int, frame: object) -> None:
        nonlocal came
        came = True
        restore(before)
        forget_terminal(number)
        with suppress(OSError):
            if is_first():
                os.write(2, NOTICE if size() == 1 else TOGETHER)  # print may be in the middle of a line that it interrupts

    for number in before:
        signal.signal(number, hold)
    try:
        yield lambda: came
    finally:
        restore(before)
    if came:
        raise KeyboardInterrupt
