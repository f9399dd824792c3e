import io
import sys

import pytest
import torch

from phase1.records.metrics import METRICS, read_metrics
from phase1.training.progress import LINE_SECONDS, SAMPLES, Progress, duration
from phase1.training.watch import Watch
from tests.training.test_step import state


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(folder, steps, monkeypatch, *, stderr=None, watch=None, seconds_per_step=1.0, first=0, until=None, device="cpu", label=""):
    """A training of `steps` steps of 100 tokens whose loss is 10 - step/100; what standard error got, and the progress."""
    stderr = stderr or io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    s, clock = state(), Clock()
    s.step, s.device = first, torch.device(device)
    progress = Progress(s, steps, 100, folder, watch or Watch(), seconds=5.0, label=label, clock=clock)
    for step in range(first + 1, (until or steps) + 1):
        clock.now += seconds_per_step
        s.step, s.grad_norm = step, torch.tensor(0.5)
        progress.step(step, torch.tensor(10 - step / 100))
    progress.close()
    return stderr.getvalue(), progress


def test_without_a_terminal_there_are_lines_at_first_and_then_every_half_minute(tmp_path, monkeypatch):
    out, _ = run(tmp_path, 100, monkeypatch)
    lines = out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 2, 5, 10, 40, 70, 100] and LINE_SECONDS == 30
    assert lines[4] == "step 40/100  40 %  loss 9.745  lr 6.0e-03  100 tok/s  1m 00s left"  # mean of steps 11 to 40
    assert out.isascii() and "\r" not in out


def test_lines_begin_with_the_label_of_the_model(tmp_path, monkeypatch):
    watch = Watch(sample=lambda model: "text", sample_every=10)
    out, _ = run(tmp_path, 10, monkeypatch, label="phase1_htt16_ar32", watch=watch)
    words = [line.removeprefix("phase1_htt16_ar32: ").split()[0] for line in out.splitlines()]
    assert words == ["step", "step", "step", "sample", "step"] and out.count("phase1_htt16_ar32: ") == 5


def test_a_terminal_gets_the_label_once_on_its_bar(tmp_path, monkeypatch):
    out, _ = run(tmp_path, 10, monkeypatch, stderr=Terminal(), label="phase1_htt16_ar32", first=5)
    assert "train phase1_htt16_ar32: " in out and "phase1_htt16_ar32: resuming" not in out and "resuming at step 5 of 10\n" in out


@pytest.mark.parametrize("label, begins", [("", ""), ("no_gate", "no_gate: ")])
def test_a_resumed_run_says_once_where_it_goes_on(label, begins, tmp_path, monkeypatch):
    assert "resuming" not in run(tmp_path, 2000, monkeypatch, until=1200, label=label)[0]
    lines = run(tmp_path, 2000, monkeypatch, first=1200, label=label)[0].splitlines()
    assert lines[0] == f"{begins}resuming at step 1,200 of 2,000" and sum("resuming" in line for line in lines) == 1


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    out, _ = run(tmp_path, 100, monkeypatch, stderr=Terminal())
    assert "\r" in out and "step 40/100" not in out


def test_the_bar_has_loss_and_rate(tmp_path, monkeypatch):
    last = run(tmp_path, 100, monkeypatch, stderr=Terminal())[0].split("\r")[-1]
    assert "loss=9.000" in last and "lr=6.0e-03" in last and "peak" not in last


def test_on_a_gpu_lines_and_the_bar_have_its_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1_530_000_000)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    out, _ = run(tmp_path, 10, monkeypatch, device="cuda")
    assert all(line.endswith("  peak 1.53 GB") for line in out.splitlines()) and len(out.splitlines()) == 4
    assert {row["peak_allocated_bytes"] for row in read_metrics(tmp_path / METRICS)} == {1_530_000_000}
    assert "peak=1.53 GB" in run(tmp_path, 10, monkeypatch, stderr=Terminal(), device="cuda")[0].split("\r")[-1]


def test_metrics_have_every_look_and_means_since_the_last(tmp_path, monkeypatch):
    run(tmp_path, 1000, monkeypatch)
    rows = read_metrics(tmp_path / METRICS)
    assert 400 <= len(rows) <= 600 and rows[-1]["step"] == 1000
    row = next(r for r in rows if r["step"] == 12)
    assert row["loss"] == pytest.approx(9.885) and row["grad_norm"] == 0.5
    assert (row["tokens"], row["seconds"], row["tokens_per_second"]) == (1200, 17.0, pytest.approx(100))


def test_scores_and_samples_come_when_asked_and_do_not_count_as_training(tmp_path, monkeypatch):
    seen, clock_of = [], []

    def score(model):
        seen.append("score")
        clock_of[0].clock.now += 1000
        return 4.5

    class Tracker:
        def __init__(self):
            self.rows, self.samples, self.closed = [], [], False

        def log(self, row):
            self.rows.append(row)

        def sample(self, step, text):
            self.samples.append((step, text))

        def close(self):
            self.closed = True

    tracker = Tracker()
    watch = Watch(score=score, score_every=4, sample=lambda model: "a\nb", sample_every=5, trackers=[tracker])
    make = Progress.__init__
    monkeypatch.setattr(Progress, "__init__", lambda self, *a, **k: (clock_of.append(self), make(self, *a, **k))[1])
    out, progress = run(tmp_path, 10, monkeypatch, watch=watch)
    rows = read_metrics(tmp_path / METRICS)
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [4, 8, 10]
    assert rows[-1]["seconds"] == progress.seconds == 15.0
    assert (tmp_path / SAMPLES).read_text() == "== step 5\na\nb\n== step 10\na\nb\n"
    assert tracker.rows == rows and tracker.samples == [(5, "a\nb"), (10, "a\nb")] and tracker.closed
    assert "val 4.500" in out.splitlines()[-2] + out.splitlines()[-1]


def test_a_resumed_run_goes_on_in_the_files_of_the_first(tmp_path, monkeypatch):
    watch = Watch(sample=lambda model: "text", sample_every=5)
    run(tmp_path, 20, monkeypatch, watch=watch, until=13)
    run(tmp_path, 20, monkeypatch, watch=watch, first=10)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == list(range(1, 21))
    assert (tmp_path / SAMPLES).read_text().count("== step") == 4


def test_time_is_up_counts_earlier_sessions(tmp_path, monkeypatch):
    _, progress = run(tmp_path, 100, monkeypatch, until=4, watch=Watch(max_seconds=10.0))
    assert progress.end is None
    progress.clock.now += 1
    assert progress.end == "time"


@pytest.mark.parametrize("seconds, text", [(0, "0s"), (59.6, "1m 00s"), (3725, "1h 02m"), (190_000, "2d 04h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
