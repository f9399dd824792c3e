"""Plot of tokens per second and step times over the sequence length."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phase1.plots.figure import MARKERS, clean, color_of, conditions, escaped, in_own_style, log_ticks, new_figure, save
from phase1.records.schema import Measurement, Report, ThroughputResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@in_own_style
def plot_throughput(report: Report[ThroughputResult], path: Path | str) -> Path:
    """Tokens per second and step time over T, with linear and quadratic guides. Returns `path`."""
    figure = new_figure(12.5, 4.6, f"Training throughput, {conditions(report)}")
    speed, time = figure.subplots(1, 2)
    for index, (key, result) in enumerate(report.results.items()):
        color = color_of(key, index)
        style: dict[str, Any] = {"color": color, "marker": MARKERS[index % len(MARKERS)], "label": escaped(key)}
        done = [m for m in result.measurements if m.status == "ok"]
        lengths = [m.seq_length for m in done]
        speed.plot(lengths, [m.tokens_per_second or 0.0 for m in done], **style)
        time.plot(lengths, [m.total_time_ms or 0.0 for m in done], **style)
        _mark_failures(speed, result.measurements, index, color)
    _guides(time, [m for result in report.results.values() for m in result.measurements if m.status == "ok"])
    lengths = sorted({m.seq_length for result in report.results.values() for m in result.measurements})
    for axes, label in ((speed, "tokens per second"), (time, "step time (ms), log scale")):
        if lengths:
            axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("T, tokens per sequence")
        axes.set_ylabel(label)
        clean(axes)
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if lengths:
        time.set_yscale("log")
        log_ticks(time.yaxis)
    figure.legend(*time.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return save(figure, path)


def _mark_failures(axes: "Axes", measurements: Sequence[Measurement], index: int, color: str) -> None:
    """A cross at the foot of the plot for a length that a model did not finish; the word beside it in black, to be read."""
    from matplotlib.transforms import blended_transform_factory

    foot = blended_transform_factory(axes.transData, axes.transAxes)
    for m in measurements:
        if m.status != "ok":
            height = 0.03 + 0.05 * index
            axes.plot([m.seq_length], [height], marker="x", color=color, markersize=8, markeredgewidth=2, transform=foot)
            word = "OOM" if m.status == "oom" else "failed"
            axes.annotate(
                word, (m.seq_length, height), xycoords=foot, xytext=(-7, 0), textcoords="offset points", fontsize=8, ha="right",
                va="center",
            )  # fmt: skip


def _guides(axes: "Axes", done: Sequence[Measurement]) -> None:
    """Lines of slope 1 and 2 through the fastest step at the shortest length, to compare slopes with."""
    lengths = sorted({m.seq_length for m in done})
    if len(lengths) < 2:
        return
    start = min(m.total_time_ms or 0.0 for m in done if m.seq_length == lengths[0])
    for power, line, label in ((1, "--", "proportional to T"), (2, ":", "proportional to T²")):
        times = [start * (length / lengths[0]) ** power for length in lengths]
        axes.plot(lengths, times, line, color="#888888", linewidth=1.2, label=label, zorder=0)
