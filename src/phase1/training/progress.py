"""Progress of a training: on the screen, in metrics.jsonl and for the trackers."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phase1.device import steadier
from phase1.files import append_text, atomic_write
from phase1.progress import LINE_SECONDS, Bar
from phase1.records.metrics import METRICS, MetricsLog, rows_of_text
from phase1.training.alarms import Alarms
from phase1.training.gates import closed_gates
from phase1.training.step import TrainState
from phase1.training.watch import Watch, first_lowest

ROWS = 400  # approximate number of rows of metrics.jsonl for a whole run
FIRST = (1, 2, 5, 10)  # steps that are shown, whenever they come
SAMPLES = "samples.txt"


class Follower:
    """The course of a training on a rank other than 0: it has its part in the losses that all look at, and shows nothing."""

    end: str | None = None  # rank 0 has the clock and the scores
    failed: OSError | None = None  # and writes
    seconds = 0.0

    def __init__(self, state: TrainState, steps: int, tokens_per_step: int, folder: Path, watch: Watch, **_: Any) -> None:
        self.state, self.steps, self.tokens_per_step, self.folder, self.watch = state, steps, tokens_per_step, folder, watch

    def step(self, step: int, loss: Tensor) -> None:
        """After optimizer step number `step`, from 1, of mean loss `loss`."""
        if self._score_due(step):
            self._score()

    def is_best(self, step: int) -> bool:
        """Whether the score of `step` is lower than all before it: rank 0 knows."""
        return False

    def keep(self) -> None:
        """With every checkpoint."""

    def require_written(self) -> None:
        """With the checkpoint of a step after which `failed` is set on rank 0."""

    def close(self) -> None:
        """At the end."""

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.steps)

    def _score_due(self, step: int) -> bool:
        return self._due(step, self.watch.score_every) and self.watch.score is not None

    def _score(self) -> float:
        assert self.watch.score is not None
        with torch.compiler.set_stance("force_eager"):
            return self.watch.score(self.state.model)


class Progress(Follower):
    """Called after every step; reads the loss, which waits for the GPU, only about ROWS times in a run.

    A terminal gets a bar. Anything else gets lines: at the first steps, then every LINE_SECONDS, and at the end; each begins
    with `label`, what the model is called, unless it is empty.
    """

    def __init__(
        self,
        state: TrainState,
        steps: int,
        tokens_per_step: int,
        folder: Path,
        watch: Watch,
        *,
        seconds: float,
        label: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(state, steps, tokens_per_step, folder, watch)
        self.clock, self.earlier_seconds, self.aside_seconds = clock, seconds, 0.0
        self.began = clock()
        self.first_step, self.steady = state.step, (state.step, self.began)
        self.every = max(1, steps // ROWS)
        self.log = MetricsLog(folder / METRICS, state.step)
        _trim_samples(folder / SAMPLES, state.step)
        self.alarms = Alarms(state.grad_clip, steadier(state.device))
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.row_at, self.line_at = (state.step, self.began), self.began
        self.line_losses: list[float] = []
        self.val_loss: float | None = None
        self.closed: list[int] = []  # layers whose rank gate was closed at the last score
        scored = rows_of_text(self.log.rows, watch.unigram_loss)
        self.scores = [(row["step"], row["val_loss"]) for row in scored]
        others = sum(row["val_loss"] is not None for row in self.log.rows) - len(scored)
        self.lines = not sys.stderr.isatty()
        self.prefix = f"{label}: " if label and self.lines else ""  # the bar has its own
        self.bar = Bar(
            total=steps * tokens_per_step, initial=state.step * tokens_per_step, desc=f"train {label}".rstrip(), unit="tok",
            unit_scale=True, disable=self.lines,
        )  # fmt: skip
        if state.step > 0:
            self._print(f"resuming at step {state.step:,} of {steps:,}")
        if others:
            self._print(
                f"losses on the valid text so far ({others:,}) are of another text, or of other tokens of it: not compared"
            )

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """Seconds of training in all sessions, without the time of scores and samples."""
        return self.earlier_seconds + self.clock() - self.began - self.aside_seconds

    @property
    def end(self) -> str | None:  # type: ignore[override]
        """Why the run should end before its last step, if it should."""
        return self.watch.over(self.seconds, [score for _, score in self.scores])

    def is_best(self, step: int) -> bool:
        """Whether the score of `step` is lower than all before it."""
        return bool(self.scores) and self.scores[first_lowest([score for _, score in self.scores])][0] == step

    def step(self, step: int, loss: Tensor) -> None:
        """After optimizer step number `step`, from 1, of mean loss `loss`."""
        self.losses.append(loss)
        if self.state.grad_norm is not None:
            self.norms.append(self.state.grad_norm)
        self.bar.update(self.tokens_per_step)
        score = self._score_due(step)
        sample = self._due(step, self.watch.sample_every) and self.watch.sample is not None
        shown = step in FIRST or step == self.steps or self.clock() - self.line_at >= LINE_SECONDS
        if not (score or sample or shown or step % self.every == 0):
            return
        losses, norms = self._look()
        self.line_losses += losses
        began = self.clock()
        val_loss = self._score() if score else None
        if val_loss is not None:
            self.scores.append((step, val_loss))
        text = self._sample(step) if sample else None
        row = self._row(step, losses, norms, val_loss, began)
        self.aside_seconds += self.clock() - began
        self.row_at = step, self.clock()
        try:
            self._write(row, text)
        except OSError as error:  # no reason to lose the steps so far: there is a checkpoint of them first
            self.failed = self.failed or error
        self._show(row, shown)
        for warning in self.alarms.look(step, losses, norms, row["loss_scale"], self.closed):
            self._print(f"warning: {warning}")
        if step == self.first_step + 1:  # the first step compiles and warms up
            self.steady = step, self.clock() - self.aside_seconds

    def _write(self, row: dict[str, Any], text: str | None) -> None:
        """Put a look at the training, and the text that it wrote, if any, into the files and trackers of both."""
        self.log.append(row)
        if text is not None:
            append_text(self.folder / SAMPLES, f"== step {row['step']}\n{text}\n")
        for tracker in self.watch.trackers:
            tracker.log(row)
            if text is not None:
                tracker.sample(row["step"], text)

    def require_written(self) -> None:
        """Raise the OSError of a file that could not be written; called once there is a checkpoint."""
        if self.failed is not None:
            self._print(f"a file could not be written; the checkpoint has step {self.state.step:,}")
            raise self.failed

    def keep(self) -> None:
        """Make the log survive a power cut; called with every checkpoint."""
        self.log.keep()

    def close(self) -> None:
        self.bar.close()
        self.log.close()
        for tracker in self.watch.trackers:
            tracker.close()

    def _look(self) -> tuple[list[float], list[float]]:
        """Losses and gradient norms since the last look."""
        losses, norms = (torch.stack(kept).tolist() if kept else [] for kept in (self.losses, self.norms))
        self.losses, self.norms = [], []
        return losses, norms

    def _score(self) -> float:
        with closed_gates(self.state.model) as self.closed:
            self.val_loss = super()._score()
        return self.val_loss

    def _sample(self, step: int) -> str:
        assert self.watch.sample is not None
        with torch.compiler.set_stance("force_eager"):
            text = self.watch.sample(self.state.model)
        self._print(f"sample at step {step}: {text!r}")
        return text

    def _row(self, step: int, losses: list[float], norms: list[float], val_loss: float | None, now: float) -> dict[str, Any]:
        before, then = self.row_at
        cuda = self.state.device.type == "cuda"
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "seconds": self.earlier_seconds + now - self.began - self.aside_seconds,
            "loss": _mean(losses),
            "val_loss": val_loss,
            "lr": self.state.optimizer.param_groups[0]["lr"],
            "grad_norm": _mean(norms),
            "loss_scale": self.state.scaler.get_scale() if self.state.scaler.is_enabled() else None,
            "tokens_per_second": (step - before) * self.tokens_per_step / max(now - then, 1e-9),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "session": self.log.session,
            "unigram_loss": self.watch.unigram_loss,
        }

    def _show(self, row: dict[str, Any], shown: bool) -> None:
        val = "" if self.val_loss is None else f"{self.val_loss:.3f}"
        peak = "" if row["peak_allocated_bytes"] is None else f"{row['peak_allocated_bytes'] / 1e9:.2f} GB"
        if not self.lines:
            facts = {"loss": f"{row['loss']:.3f}", "val": val, "lr": f"{row['lr']:.1e}", "peak": peak}
            self.bar.set_postfix({name: value for name, value in facts.items() if value}, refresh=False)
        elif shown:
            loss = sum(self.line_losses) / len(self.line_losses)
            parts = [
                f"step {row['step']:,}/{self.steps:,} {100 * row['step'] / self.steps:3.0f} %",
                f"loss {loss:.3f}", val and f"val {val}", f"lr {row['lr']:.1e}", f"{row['tokens_per_second']:,.0f} tok/s",
                self._left(row["step"]), peak and f"peak {peak}",
            ]  # fmt: skip
            self._print("  ".join(part for part in parts if part))
        if shown:
            self.line_at, self.line_losses = self.clock(), []

    def _left(self, step: int) -> str:
        """Time to the end, at the speed of the steps after the first."""
        first, then = self.steady
        if step <= first or step == self.steps:
            return ""
        seconds = (self.clock() - self.aside_seconds - then) / (step - first) * (self.steps - step)
        return f"{duration(seconds)} left"

    def _print(self, text: str) -> None:
        ascii_text = (self.prefix + text).encode("ascii", "backslashreplace").decode()
        with suppress(OSError):  # whoever read this has gone, or its disk is full: no reason to lose a training
            if self.lines:
                print(ascii_text, file=sys.stderr, flush=True)
            else:
                self.bar.write(ascii_text, file=sys.stderr)


def duration(seconds: float) -> str:
    """`seconds` rounded to at most two units: 40s, 5m 20s, 3h 05m, 2d 04h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h"
    if hours:
        return f"{hours}h {m:02}m"
    return f"{m}m {s:02}s" if minutes else f"{s}s"


def _trim_samples(path: Path, step: int) -> None:
    """Remove the samples after `step`, which will be written again; what is no sample stays."""
    if path.is_file():
        content = path.read_bytes()
        parts = re.split(rb"(?m)^(?=== step \d+$)", content)
        begins = [re.match(rb"== step (\d+)$", part, re.MULTILINE) for part in parts]
        left = b"".join(part for part, begin in zip(parts, begins, strict=True) if begin is None or int(begin[1]) <= step)
        if left != content:
            atomic_write(path, left)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
