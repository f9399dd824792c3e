"""Time the phases of one training step through the marks of `train_step`."""

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of the phases of one step; a phase that runs more than once (micro batches) is summed."""

    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    communication_ms: float = 0.0  # with other ranks, and the wait for them
    launch_ms: float | None = None  # until the host had launched all of it; None on the CPU, which launches nothing

    @property
    def total_ms(self) -> float:
        """The whole step: its phases follow each other without a gap, and each is counted once."""
        return self.forward_ms + self.backward_ms + self.communication_ms + self.optimizer_ms


class Stopwatch:
    """The `mark` of one `train_step`. On CUDA it records events, without waiting; on the CPU it reads a clock."""

    def __init__(self, device_type: str) -> None:
        self._cuda = device_type == "cuda"
        self._moments: list[tuple[str, Any]] = []
        self._launched: list[float] = []  # seconds, the host's clock at each moment of a CUDA step

    def mark(self, name: str) -> None:
        """Note the moment at which the phase `name` ended ("start": the step began)."""
        self._moments.append((name, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._launched.append(time.perf_counter())
        return event

    def step_time(self) -> StepTime:
        """The phases of the step that was marked, after waiting for the GPU to finish it."""
        if self._cuda:
            torch.cuda.synchronize()
        spent = {"forward": 0.0, "backward": 0.0, "communication": 0.0, "optimizer": 0.0}
        for (_, begin), (name, end) in zip(self._moments, self._moments[1:], strict=False):
            spent[name] += begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3
        launch_ms = (self._launched[-1] - self._launched[0]) * 1e3 if self._cuda else None
        return StepTime(**{f"{name}_ms": value for name, value in spent.items()}, launch_ms=launch_ms)


def median_step(steps: list[StepTime]) -> StepTime:
    """The step whose total is the median; of an even number the slower of the two in the middle.

    Medians of each phase apart would not add up to the median of the total.
    """
    return sorted(steps, key=lambda step: step.total_ms)[len(steps) // 2]
