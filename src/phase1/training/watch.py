"""What is observed while a model trains; none of it changes the training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from phase1.records.metrics import PATIENCE
from phase1.trainable import Trainable

TIME = "time"  # why a training pauses


class Tracker(Protocol):
    """A viewer that also receives the progress of a training."""

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""

    def sample(self, step: int, text: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Watch:
    """Observations of a training; `score_every` and `sample_every` are in optimizer steps, 0 is never."""

    score: Callable[[Trainable], float] | None = None
    """Loss in nats per token of text that is not trained on."""
    score_every: int = 0
    unigram_loss: float | None = None
    """Entropy of that text's token frequencies: the score that ignoring all context reaches."""
    sample: Callable[[Trainable], str] | None = None
    sample_every: int = 0
    max_seconds: float = math.inf
    """Seconds of training in all sessions, after which the run saves a checkpoint and ends."""
    keep_best: bool = False
    """Keep the weights of the lowest score besides those of the last step."""
    patience: int | None = None
    """Scores in a row without a new lowest, after which the run ends."""
    trackers: Sequence[Tracker] = ()

    def over(self, seconds: float, scores: Sequence[float]) -> str | None:
        """Which limit a training of so many seconds and of these scores has reached, if any: TIME or PATIENCE."""
        if seconds >= self.max_seconds:
            return TIME
        since = len(scores) - 1 - first_lowest(scores)
        return PATIENCE if self.patience is not None and scores and since >= self.patience else None


def first_lowest(scores: Sequence[float]) -> int:
    """The place of the first lowest score; -1 where there is none."""
    return min(range(len(scores)), key=lambda i: scores[i], default=-1)
