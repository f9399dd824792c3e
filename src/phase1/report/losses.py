"""Plot of losses by length of the context and by frequency of the target."""

from pathlib import Path

from phase1.record import PerplexityResult, Report
from phase1.report.plots import MARKERS, _clean, _color, _conditions, _figure, _save, _text, _trained_on
from phase1.tables.losses import bands, comparable


def plot_losses(report: Report[PerplexityResult], path: Path | str) -> Path:
    """Mean loss over octaves of the context, and over bands of frequency, a line per model. Returns `path`."""
    figure = _figure(11, 4.6, f"Loss by context and by frequency\n{_trained_on(report)}, {_conditions(report)}")
    context, frequency = figure.subplots(1, 2, sharey=False)
    shown = comparable(report)
    ranks = bands(shown)
    positions = {key: result.loss_by_position or [] for key, result in shown.items()}
    titles = ((context, positions, "tokens of the window before the target"), (frequency, ranks, "frequency rank in training"))
    for axes, by_model, label in titles:
        groups = sorted({(part.first, part.last) for parts in by_model.values() for part in parts})
        for key, parts in by_model.items():
            index = list(report.results).index(key)
            axes.plot(
                [groups.index((part.first, part.last)) for part in parts],
                [part.avg_loss for part in parts],
                color=_color(key, index),
                marker=MARKERS[index % len(MARKERS)],
                label=_text(key),
            )
        names = [f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in groups]
        axes.set_xticks(range(len(groups)), names, rotation=30, ha="right", fontsize=8)
        axes.set_xlabel(label)
        axes.set_ylabel("loss (nats per token)")
        _clean(axes)
        if by_model:
            axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)
