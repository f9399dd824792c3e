"""Plot of the course of trainings: loss and validation loss over tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phase1.plots.figure import OTHER_COLORS, clean, escaped, in_own_style, limit_line, new_figure, save


@in_own_style
def plot_training(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path | str, unigram_loss: float | None = None) -> Path:
    """Rows of metrics.jsonl by the name of their run; the loss thin, the validation loss with marks. Returns `path`.

    The line at `unigram_loss` is what ignoring all context reaches at best.
    """
    figure = new_figure(9, 5, "Loss during training")
    axes = figure.subplots()
    for i, (name, rows) in enumerate(runs.items()):
        color = OTHER_COLORS[i % len(OTHER_COLORS)]
        loss = [(row["tokens"], row["loss"]) for row in rows if row["loss"] is not None]
        valid = [(row["tokens"], row["val_loss"]) for row in rows if row["val_loss"] is not None]
        if loss:
            axes.plot(*zip(*loss), color=color, linewidth=0.8, alpha=0.6, label=f"{escaped(name)}, training text")
        if valid:
            axes.plot(*zip(*valid), color=color, linewidth=1.5, marker="o", markersize=4, label=f"{escaped(name)}, valid text")
    if unigram_loss is not None:
        limit_line(axes, "entropy of the valid text's token frequencies", unigram_loss)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    clean(axes)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    return save(figure, path)
