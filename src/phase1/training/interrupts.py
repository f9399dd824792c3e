"""Interrupts that wait for a moment at which nothing is lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NOTICE = b"\ninterrupted: ends after this step, with a checkpoint; once more to end at once\n"


@contextmanager
def interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM is held until the end of the block, which then raises KeyboardInterrupt; a second one acts at once.

    Yields a function that says whether one has come, for a loop that can end early. A signal that is ignored stays so, and
    a block outside the main thread holds nothing, since it receives nothing.
    """
    came = False
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(*_: object) -> None:
        nonlocal came
        came = True
        restore()
        os.write(2, NOTICE)  # print may be in the middle of a line that it interrupts

    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, hold)
    try:
        yield lambda: came
    finally:
        restore()
    if came:
        raise KeyboardInterrupt
