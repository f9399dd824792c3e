"""The memory of a training step over time, as a stacked plot."""

from pathlib import Path
from typing import TYPE_CHECKING

from phase1.plots.figure import COLORS, clean, conditions, escaped, in_own_style, new_figure, save
from phase1.records.schema import MemoryResult, MemoryTimeline, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {"forward": "#F2F2F2", "backward": "#FFFFFF", "optimizer": "#E6E6E6"}


@in_own_style
def plot_memory_timeline(report: Report[MemoryResult], path: Path | str) -> Path:
    """Live bytes by part through forward, backward and optimizer step, a panel per model. Returns `path`."""
    timelines = {key: result.timeline for key, result in report.results.items() if result.timeline is not None}
    panels = max(1, len(timelines))
    figure = new_figure(8.5, 1.2 + 2.6 * panels, f"Memory over one training step, {conditions(report)}")
    for axes, (key, timeline) in zip(figure.subplots(panels, 1, squeeze=False)[:, 0], timelines.items()):
        _draw(axes, key, timeline)
    figure.axes[-1].set_xlabel("allocations and frees since the step began")
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, loc="outside right upper", reverse=True)
    return save(figure, path)


def _draw(axes: "Axes", key: str, timeline: MemoryTimeline) -> None:
    floors = [0.0] * len(timeline.at)
    for index, (part, counts) in enumerate(timeline.parts.items()):
        tops = [floor + max(count, 0) / 1e9 for floor, count in zip(floors, counts)]
        if max(counts, default=0) >= 5e6:  # less is not visible
            color, label = COLORS[index % len(COLORS)], escaped(part.replace("_", " "))
            axes.fill_between(timeline.at, floors, tops, step="post", color=color, label=label, linewidth=0)
        floors = tops
    peak = max(floors, default=0.0)
    begins = list(timeline.phase_begins.items())
    for (name, start), end in zip(begins, [*(start for _, start in begins[1:]), timeline.events]):
        axes.axvspan(start, end, color=SHADES.get(name, "#FFFFFF"), zorder=0)
        corner = ("data", "axes fraction")
        axes.annotate(escaped(name), (start, 0.98), xycoords=corner, fontsize=8, va="top", color="#444444")
    axes.set_xlim(0, max(timeline.events, 1))
    axes.set_ylim(0, 1.25 * peak or 1.0)
    axes.set_ylabel("memory (GB)")
    axes.set_title(f"{escaped(key)}: peak {peak:.2f} GB", fontsize=10, loc="left")
    clean(axes)
