"""Reports -> plots. Figures are made without pyplot, so that no state is left behind and no display is needed."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phase1.files import atomic_write, one_line
from phase1.record import Measurement, MemoryResult, PerplexityResult, Report, ThroughputResult
from phase1.tables.common import basis_of, hardware_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind readers and in print
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000", "#999999", "#882255")
MARKERS = "osD^vPX*"
ROLE_COLORS = {"baseline": COLORS[1], "baseline_optimized": COLORS[4], "phase1": COLORS[0]}
OTHER_COLORS = tuple(color for color in COLORS if color not in ROLE_COLORS.values())
GREY_PARTS = {
    "unattributed": "#888888",
    "fragmentation: reserved, not allocated": "#C8C8C8",
    "context, outside the allocator": "#E2E2E2",
}


def plot_throughput(report: Report[ThroughputResult], path: Path | str) -> Path:
    """Tokens per second and step time over T, with linear and quadratic guides. Returns `path`."""
    figure = _figure(12.5, 4.6, f"Training throughput, {_conditions(report)}")
    speed, time = figure.subplots(1, 2)
    for index, (key, result) in enumerate(report.results.items()):
        color = _color(key, index)
        style: dict[str, Any] = {"color": color, "marker": MARKERS[index % len(MARKERS)], "label": _text(key)}
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
        _clean(axes)
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if lengths:
        time.set_yscale("log")
        _log_ticks(time.yaxis)
    figure.legend(*time.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return _save(figure, path)


def _mark_failures(axes: "Axes", measurements: Sequence[Measurement], index: int, color: str) -> None:
    """A cross at the foot of the plot for a length that a model did not finish."""
    from matplotlib.transforms import blended_transform_factory

    foot = blended_transform_factory(axes.transData, axes.transAxes)
    for m in measurements:
        if m.status != "ok":
            height = 0.03 + 0.05 * index
            axes.plot([m.seq_length], [height], marker="x", color=color, markersize=8, markeredgewidth=2, transform=foot)
            word = "OOM" if m.status == "oom" else "failed"
            axes.annotate(
                word, (m.seq_length, height), xycoords=foot, xytext=(-7, 0), textcoords="offset points", color=color,
                fontsize=8, ha="right", va="center",
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


def plot_memory(report: Report[MemoryResult], path: Path | str) -> Path:
    """Every model's memory as a stacked bar, with the limits of the cards. Returns `path`.

    The parts of the allocated peak are coloured; above them, grey, what the card must hold besides.
    """
    figure = _figure(8.5, 4.8, f"Peak memory of one training step, {_conditions(report)}")
    axes = figure.subplots()
    keys = list(report.results)
    floors = [0.0] * len(keys)
    for index, (part, counts) in enumerate(_memory_parts(report).items()):
        heights = [max(counts.get(key, 0), 0) / 1e9 for key in keys]  # a correction may be negative
        if max(heights, default=0.0) < 0.005:  # GB; less is not visible
            continue
        color = GREY_PARTS.get(part, COLORS[index % len(COLORS)])
        label = _text(part.replace("_", " "))
        axes.bar(range(len(keys)), heights, 0.55, floors, label=label, color=color, edgecolor="white", linewidth=0.6)
        floors = [floor + height for floor, height in zip(floors, heights)]
    for x, key in enumerate(keys):
        _bar_label(axes, x, floors[x], report.results[key])
    limits = {check.name: check.limit / 1e9 for check in report.checks if check.name.startswith("fits_") and check.limit}
    axes.set_ylim(0, 1.22 * max([*floors, *limits.values()], default=1.0) or 1.0)
    for name, limit in limits.items():
        card = re.sub(r"fits_(\d+)gb", r"\1 GB card", name)
        _limit_line(axes, _text(f"{limit:.1f} GB: limit of the {card}"), limit)
    axes.set_xlim(-0.5, len(keys) - 0.1)
    axes.set_xticks(range(len(keys)), [_text(key) for key in keys])
    axes.set_ylabel("memory (GB)")
    _clean(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    return _save(figure, path)


def _limit_line(axes: "Axes", label: str, height: float) -> None:
    axes.axhline(height, color="#444444", linestyle="--", linewidth=1, zorder=0.5)
    axes.annotate(
        label, (1, height), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points", fontsize=8,
        ha="right", va="bottom", color="#444444",
    )  # fmt: skip


def _memory_parts(report: Report[MemoryResult]) -> dict[str, dict[str, int]]:
    """Bytes of every part by model: the breakdown of the allocated peak, then what is reserved and outside."""
    parts: dict[str, dict[str, int]] = {}
    for key, result in report.results.items():
        rest = {} if result.unattributed_bytes is None else {"unattributed": result.unattributed_bytes}
        for part, count in (result.breakdown | rest).items():
            parts.setdefault(part, {})[key] = count
    for key, result in report.results.items():
        if result.peak_allocated_bytes is not None:
            reserved = result.peak_reserved_bytes or result.peak_allocated_bytes
            parts.setdefault("fragmentation: reserved, not allocated", {})[key] = reserved - result.peak_allocated_bytes
            parts.setdefault("context, outside the allocator", {})[key] = result.outside_allocator_bytes or 0
    return parts


def _bar_label(axes: "Axes", x: int, top: float, result: MemoryResult) -> None:
    """Write the peaks, or why there is none, above bar `x` of height `top` GB."""
    if result.peak_allocated_bytes is None:
        text, color = ("OOM" if result.status == "oom" else "failed"), "#AA0000"
    else:
        held = (result.peak_reserved_bytes or result.peak_allocated_bytes) + (result.outside_allocator_bytes or 0)
        text, color = f"{result.peak_allocated_bytes / 1e9:.2f} GB allocated\n{held / 1e9:.2f} GB in all", "black"
    axes.annotate(
        text, (x, top), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8.5, color=color
    )


def _color(key: str, index: int) -> str:
    return ROLE_COLORS.get(key, OTHER_COLORS[index % len(OTHER_COLORS)])


def _trained_on(report: Report[PerplexityResult]) -> str:
    trained = {result.trained_tokens for result in report.results.values() if result.trained_tokens}
    names = {result.dataset.name for result in report.results.values() if result.dataset}
    return f"trained on {', '.join(f'{count:,}' for count in sorted(trained))} tokens, scored on {', '.join(sorted(names))}"


def _log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def _conditions(report: Report[Any]) -> str:
    symbols = {"B": "batch_size", "T": "seq_length"}
    sizes = ", ".join(f"{symbol} = {report.run[name]}" for symbol, name in symbols.items() if name in report.run)
    return f"{sizes}\n{hardware_of(report)} ({basis_of(report.results.values())})"


def _figure(width: float, height: float, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle("\n".join(_text(line) for line in title.split("\n")), fontsize=11)
    return figure


def _text(text: str) -> str:
    """Names come from files: a dollar would start a formula."""
    return one_line(text, 100).replace("$", r"\$")


def _clean(axes: "Axes") -> None:
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", path: Path | str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None}, pil_kwargs=None)
    atomic_write(path, image.getvalue())
    return Path(path)
