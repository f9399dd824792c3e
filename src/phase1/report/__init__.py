"""Reports -> what a command prints, and its plots."""

from phase1.report.losses import plot_losses
from phase1.report.perplexity import plot_perplexity
from phase1.report.plots import plot_memory, plot_throughput
from phase1.report.text import checks_text, memory_text, perplexity_text, throughput_text
from phase1.report.timeline import plot_memory_timeline

__all__ = [
    "checks_text",
    "memory_text",
    "perplexity_text",
    "plot_losses",
    "plot_memory",
    "plot_memory_timeline",
    "plot_perplexity",
    "plot_throughput",
    "throughput_text",
]
