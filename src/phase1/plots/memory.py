"""Plot of every model's peak memory, by part, against the limits of the cards."""

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from phase1.plots.figure import COLORS, clean, conditions, escaped, in_own_style, limit_line, new_figure, save
from phase1.records.schema import MemoryResult, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
GREY_PARTS = {
    "unattributed": "#888888",
    "fragmentation: reserved, not allocated": "#C8C8C8",
    "context, outside the allocator": "#E2E2E2",
}
LABEL_CHARS = 12  # of a line below a bar, of four beside each other


@in_own_style
def plot_memory(report: Report[MemoryResult], path: Path | str) -> Path:
    """Every model's memory as a stacked bar, with the limits of the cards. Returns `path`.

    The parts of the allocated peak are coloured; above them, grey, what the card must hold besides.
    """
    figure = new_figure(8.5, 4.8, f"Peak memory of one training step, {conditions(report)}")
    axes = figure.subplots()
    keys = list(report.results)
    floors = [0.0] * len(keys)
    for index, (part, counts) in enumerate(_memory_parts(report).items()):
        heights = [max(counts.get(key, 0), 0) / 1e9 for key in keys]  # a correction may be negative
        if max(heights, default=0.0) < 0.005:  # GB; less is not visible
            continue
        color = GREY_PARTS.get(part, COLORS[index % len(COLORS)])
        label = escaped(part.replace("_", " "))
        axes.bar(range(len(keys)), heights, 0.55, floors, label=label, color=color, edgecolor="white", linewidth=0.6)
        floors = [floor + height for floor, height in zip(floors, heights)]
    for x, key in enumerate(keys):
        _bar_label(axes, x, floors[x], report.results[key])
    limits = {check.name: check.limit / 1e9 for check in report.checks if check.name.startswith("fits_") and check.limit}
    axes.set_ylim(0, 1.22 * max([*floors, *limits.values()], default=1.0) or 1.0)
    for name, limit in limits.items():
        card = re.sub(r"fits_(\d+)gb", r"\1 GB card", name)
        card = report.run.get("card_name") or "--vram-limit" if card == name else f"the {card}"
        limit_line(axes, escaped(f"{limit:.1f} GB: limit of {card}"), limit)
    axes.set_xlim(-0.5, len(keys) - 0.1)
    axes.set_xticks(range(len(keys)), [_in_lines(key) for key in keys])
    axes.set_ylabel("memory (GB)")
    clean(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    return save(figure, path)


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


def _in_lines(key: str) -> str:
    """`key`, broken after underscores where it is wider than its bar."""
    lines = textwrap.wrap(key.replace("_", "_ "), LABEL_CHARS)
    return "\n".join(escaped(line.replace("_ ", "_")) for line in lines)


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
