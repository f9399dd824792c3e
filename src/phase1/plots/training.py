"""Plot of the course of trainings: loss and validation loss over tokens."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from phase1.plots.figure import OTHER_COLORS, clean, escaped, in_own_style, limit_line, new_figure, save


@in_own_style
def plot_training(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path | str) -> Path:
    """Rows of metrics.jsonl by the name of their run; the loss thin, the validation loss with marks. Returns `path`.

    A triangle is where a run was resumed; dashed is what ignoring all context reaches at best on the valid text.
    """
    figure = new_figure(9, 5, "Loss during training")
    axes = figure.subplots()
    for i, (name, rows) in enumerate(runs.items()):
        color = OTHER_COLORS[i % len(OTHER_COLORS)]
        for label, points, style in (
            ("training text", _points(rows, "loss"), {"linewidth": 0.8, "alpha": 0.6}),
            ("valid text", _points(rows, "val_loss"), {"linewidth": 1.5, "marker": "o", "markersize": 4}),
            ("resumed", _resumed(rows), {"linestyle": "", "marker": ">", "markersize": 7, "markerfacecolor": "none"}),
        ):
            if points:
                axes.plot(*zip(*points), color=color, label=f"{escaped(name)}, {label}", **style)
    for loss in dict.fromkeys(row.get("unigram_loss") for rows in runs.values() for row in rows):
        if loss is not None:
            limit_line(axes, "entropy of the valid text's token frequencies", loss)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    clean(axes)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    return save(figure, path)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["tokens"], row[name]) for row in rows if row[name] is not None]


def _resumed(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The first loss of every session but the first."""
    known = [row for row in rows if row["loss"] is not None]
    return [(row["tokens"], row["loss"]) for before, row in pairwise(known) if row["session"] != before["session"]]
