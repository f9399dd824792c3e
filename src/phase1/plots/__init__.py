"""Reports -> plots."""

from phase1.plots.losses import plot_losses
from phase1.plots.memory import plot_memory
from phase1.plots.perplexity import plot_perplexity
from phase1.plots.throughput import plot_throughput
from phase1.plots.timeline import plot_memory_timeline
from phase1.plots.training import plot_training

__all__ = ["plot_losses", "plot_memory", "plot_memory_timeline", "plot_perplexity", "plot_throughput", "plot_training"]
