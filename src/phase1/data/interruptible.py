"""Long calls into a library that Ctrl-C can end: Python looks at signals only between its own instructions."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.1  # between looks at signals


def interruptible(work: Callable[[], T]) -> T:
    """`work()`, done by another thread while this one waits and answers signals; an interrupt leaves that thread behind.

    For work that holds no lock of Python's while it computes. What it raises is raised here.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)  # daemon: the end of the program does not wait for it
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
    if "error" in outcome:
        raise outcome["error"]
    value: T = outcome["value"]
    return value
