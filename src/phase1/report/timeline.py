"""The memory of a training step over time, as a stacked plot."""

from pathlib import Path
from typing import TYPE_CHECKING

from phase1.record import MemoryResult, MemoryTimeline, Report
from phase1.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {"forward": "#F2F2F2", "backward": "#FFFFFF", "optimizer": "#E6E6E6"}


def plot_memory_timeline(report: Report[MemoryResult], path: Path | str) -> Path:
    """Live bytes by part through forward, backward and optimizer step, a panel per model. Returns `path`."""
    timelines = {key: result.timeline for key, result in report.results.items() if result.timeline is not None}
    figure = plots._figure(8.5, 1.2 + 2.6 * max(1, len(timelines)), f"Memory over one training step, {plots._conditions(report)}")
    for axes, (key, timeline) in zip(figure.subplots(max(1, len(timelines)), 1, squeeze=False)[:, 0], timelines.items()):
        _draw(axes, key, timeline)
    figure.axes[-1].set_xlabel("allocations and frees since the step began")
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, loc="outside right upper", reverse=True)
    return plots._save(figure, path)


def _draw(axes: "Axes", key: str, timeline: MemoryTimeline) -> None:
    parts = list(timeline.parts)
    series = [[max(count, 0) / 1e9 for count in timeline.parts[part]] for part in parts]
    for index, (part, values) in enumerate(zip(parts, series)):
        if max(values, default=0.0) >= 0.005:  # GB; less is not visible
            floors = [sum(rest) for rest in zip(*series[:index])] or [0.0] * len(values)
            tops = [floor + value for floor, value in zip(floors, values)]
            axes.fill_between(
                timeline.at, floors, tops, step="post", color=plots.COLORS[index % len(plots.COLORS)], label=plots._text(part.replace("_", " ")),
                linewidth=0,
            )  # fmt: skip
    totals = [sum(values) for values in zip(*series)]
    axes.set_ylim(0, 1.25 * max(totals, default=1.0))
    for name, end in zip(timeline.phase_begins, [*list(timeline.phase_begins.values())[1:], timeline.events]):
        start = timeline.phase_begins[name]
        axes.axvspan(start, end, color=SHADES.get(name, "#FFFFFF"), zorder=0)
        axes.annotate(plots._text(name), (start, 0.98), xycoords=("data", "axes fraction"), fontsize=8, va="top", color="#444444")
    axes.set_xlim(0, max(timeline.events, 1))
    axes.set_ylabel("memory (GB)")
    axes.set_title(f"{plots._text(key)}: peak {max(totals, default=0.0):.2f} GB", fontsize=10, loc="left")
    plots._clean(axes)
