"""Plot of losses by length of the context and by frequency of the target."""

from pathlib import Path

from phase1.plots.figure import clean, conditions, escaped, in_own_style, new_figure, save, trained_on
from phase1.plots.perplexity import series_styles
from phase1.records.schema import LossPart, PerplexityResult, Report
from phase1.roster import Key
from phase1.tables.losses import bands, comparable


@in_own_style
def plot_losses(report: Report[PerplexityResult], path: Path | str) -> Path:
    """Plot the mean loss over octaves of the context and over bands of frequency, a line per model. Returns `path`.

    If there is a baseline and another model, the loss of the baseline of the same seed is subtracted: models differ by a
    hundredth of what groups differ by.
    """
    shown = comparable(report)
    positions = {key: result.loss_by_position or [] for key, result in shown.items()}
    panels = (positions, "tokens of the window before the target"), (bands(shown), "frequency rank in training")
    against = len(shown) > 1 and "baseline" in shown
    styles = series_styles(shown)
    first_of = {Key.parse(key).model: key for key in reversed(shown)}  # one seed of each is in the legend
    figure = new_figure(12, 4.6, f"Loss by context and by frequency\n{trained_on(report)}, {conditions(report)}")
    for axes, (by_model, label) in zip(figure.subplots(1, 2), panels):
        groups = sorted({(part.first, part.last) for parts in by_model.values() for part in parts})
        for key, losses in _losses(by_model, against).items():
            places = [groups.index(group) for group in losses]
            entry = escaped(key) if key in first_of.values() else "_"
            axes.plot(places, list(losses.values()), **styles[key], markersize=5, linewidth=1.3, label=entry)
        names = [f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in groups]
        axes.set_xticks(range(len(groups)), names, rotation=30, ha="right", fontsize=8)
        axes.set_xlabel(label)
        axes.set_ylabel(f"loss{' less that of the baseline' if against else ''} (nats per token)")
        clean(axes)
    if shown:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return save(figure, path)


def _losses(by_model: dict[str, list[LossPart]], against: bool) -> dict[str, dict[tuple[int, int], float]]:
    """Losses by group for every model; if `against`, minus those of the baseline of its seed, for models that have one."""
    losses = {key: {(part.first, part.last): part.avg_loss for part in parts} for key, parts in by_model.items()}
    if not against:
        return losses
    found = {}
    for key, by_group in losses.items():
        if base := losses.get(str(Key.parse(key).baseline)):
            found[key] = {group: loss - base[group] for group, loss in by_group.items() if group in base}
    return found
