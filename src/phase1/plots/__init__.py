"""Reports -> plots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phase1.plots.losses import plot_losses
from phase1.plots.memory import plot_memory
from phase1.plots.perplexity import plot_perplexity
from phase1.plots.throughput import plot_throughput
from phase1.plots.timeline import plot_memory_timeline
from phase1.plots.training import plot_training
from phase1.records.schema import Report

__all__ = [
    "plot_losses",
    "plot_memory",
    "plot_memory_timeline",
    "plot_perplexity",
    "plot_throughput",
    "plot_training",
    "plots_of",
]

Plot = Callable[[Report[Any], Path], Path]


def plots_of(report: Report[Any]) -> list[Plot]:
    """Every plot that has something to show of a report."""
    done = [result for result in report.results.values() if result.status == "ok"]
    if report.kind == "memory":
        timeline = any(result.timeline is not None for result in done)
        return ([plot_memory] if done else []) + ([plot_memory_timeline] if timeline else [])
    if report.kind == "throughput":
        return [plot_throughput] if done else []
    return ([plot_perplexity] if len(done) > 1 else []) + ([plot_losses] if done else [])
