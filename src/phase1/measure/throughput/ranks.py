"""Measuring on several ranks: a failure on one is a failure on all, and a step lasts until the slowest has made it."""

from collections.abc import Callable, Sequence
from typing import Any

from phase1.machine.isolate import Outcome, run_here
from phase1.measure.throughput.timing import StepTime
from phase1.parallel.group import FAILED, OUT_OF_MEMORY, Lost, PeerFailed, gate, gathered, together

STATUS = {"ok": 0, "oom": OUT_OF_MEMORY, "error": FAILED}


def attempt(function: Callable[..., object], *args: Any) -> Outcome[Any]:
    """`run_here` on all ranks, of a function that may call `gate`: ok where every rank's call is.

    A rank that fails goes to the gate where the others are or will be, that of the function or the one at its end, and says
    so; they then leave the function there, and all are at the same place again. Raises Lost where a rank is gone.
    """

    def call() -> Lost | PeerFailed | None:
        try:
            function(*args)
        except (Lost, PeerFailed) as error:
            return error.with_traceback(None)  # with it go the tensors of its frames
        return None

    outcome: Outcome[Any] = run_here(call)
    if isinstance(outcome.value, Lost):
        raise outcome.value
    if isinstance(outcome.value, PeerFailed):
        return _of_a_peer(outcome.value)
    if together():
        try:
            gate(STATUS[outcome.status])
        except PeerFailed as error:
            return _of_a_peer(error)
    return outcome


def _of_a_peer(error: PeerFailed) -> Outcome[Any]:
    return Outcome("oom" if "memory" in str(error) else "error", message=str(error))


def slowest(steps: Sequence[StepTime]) -> list[StepTime]:
    """Of every step, the times of the rank that took longest: the next one begins when all have made it."""
    return [max(ranks, key=lambda step: step.total_ms) for ranks in zip(*gathered(list(steps)), strict=True)]
