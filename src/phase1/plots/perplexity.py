"""Plot of perplexity against the size of the token table, and the styles of models in the plots of a perplexity report."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phase1.plots.figure import (
    COLORS,
    ROLE_COLORS,
    clean,
    conditions,
    escaped,
    in_own_style,
    limit_line,
    log_ticks,
    new_figure,
    save,
    trained_on,
)
from phase1.records.schema import PerplexityResult, Report
from phase1.roster import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENGINE_COLORS = ("#0072B2", "#56B4E9", "#003B5C", "#7FA8C9")  # by AR-SSM rank
ENGINE_MARKERS = "sDoh"
ENGINE_LINES = ("-", "--", ":", "-.")  # by HTT rank
OTHER_COLORS = tuple(c for c in COLORS if c not in (*ENGINE_COLORS, ROLE_COLORS["baseline"], "#F0E442"))  # yellow is faint
OTHER_MARKERS = "^vPX*"
BESIDE = 0.02  # decades between models whose tables are equally large


@in_own_style
def plot_perplexity(report: Report[PerplexityResult], path: Path | str) -> Path:
    """Plot the change of perplexity over the size of the token table, with the 5 % line. Returns `path`.

    If there are engines of several ranks, those of one AR-SSM rank are a series, a line per seed in the order of their HTT
    ranks. Every other model is a point. Repetitions look alike and share an entry of the legend.
    """
    figure = new_figure(9.5, 5, f"Perplexity against size of the token table\n{trained_on(report)}, {conditions(report)}")
    axes = figure.subplots()
    found = {key: change for key, result in report.results.items() if (change := _change(key, result))}
    changes = dict(
        sorted(found.items(), key=lambda item: (Key.parse(item[0]).ranks or (0, 0))[::-1])
    )  # engines last, by their ranks
    places, styles, series = _side_by_side(report, changes), series_styles(changes), _series(changes)
    for label, keys in series.items():
        points = {key: (places[key], *changes[key]) for key in keys}
        if label in report.results:
            label = f"{label}: {', '.join(f'{report.results[key].perplexity:,.2f}' for key in keys)}"
        _draw(axes, points, styles[keys[0]], escaped(label))
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.15)
    _name_tables(axes, report, changes)
    limit_line(axes, "limit: 5 %", 5)
    axes.axhline(0, color="#BBBBBB", linewidth=1, zorder=0)
    log_ticks(axes.xaxis)
    axes.set_xlabel("parameters of the token table (millions), log scale; equally large ones side by side")
    axes.set_ylabel("perplexity against baseline (%), 95 % interval")
    clean(axes)
    if changes:
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return save(figure, path)


def series_styles(keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Color, marker and line for every key, by an engine's ranks or another model's name; seeds of one model look alike."""
    names = {key: Key.parse(key).model for key in keys}
    engines = [ranks for name in names.values() if (ranks := Key.parse(name).ranks)]
    htt_ranks, ar_ranks = (sorted({ranks[i] for ranks in engines}) for i in (0, 1))
    others = [name for name in dict.fromkeys(names.values()) if not Key.parse(name).ranks and name != "baseline"]

    def look(name: str) -> dict[str, Any]:
        color, marker, line = ROLE_COLORS["baseline"], "o", "-"
        if ranks := Key.parse(name).ranks:
            htt, ar = htt_ranks.index(ranks[0]), ar_ranks.index(ranks[1])
            color, marker = (of[ar % len(of)] for of in (ENGINE_COLORS, ENGINE_MARKERS))
            line = ENGINE_LINES[htt % len(ENGINE_LINES)]
        elif name in others:
            color, marker = (of[others.index(name) % len(of)] for of in (OTHER_COLORS, OTHER_MARKERS))
        return {"color": color, "marker": marker, "linestyle": line}

    return {key: look(name) for key, name in names.items()}


def _change(key: str, result: PerplexityResult) -> tuple[float, float, float] | None:
    """Percent against the baseline and its interval; None for what is untrained or has nothing to be compared with."""
    if result.parameters is None or result.perplexity is None or result.untrained:
        return None
    value = 0.0 if Key.parse(key).model == "baseline" else result.ppl_degradation_percent
    return None if value is None else (value, *(result.degradation_ci95 or (value, value)))


def _series(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys by their label in the legend: the AR-SSM rank for engines if there are several, the name for other models."""
    keys = list(keys)
    several = len({ranks for key in keys if (ranks := Key.parse(key).ranks)}) > 1
    found: dict[str, list[str]] = {}
    for key in keys:
        ranks = Key.parse(key).ranks
        found.setdefault(f"phase1, AR-SSM rank {ranks[1]}" if ranks and several else Key.parse(key).model, []).append(key)
    return found


def _side_by_side(report: Report[PerplexityResult], keys: Iterable[str]) -> dict[str, float]:
    """The place of each model on the axis of sizes (millions): models with tables of one size stand side by side there."""
    sizes = {key: parameters.embedding for key in keys if (parameters := report.results[key].parameters)}
    places = {}
    for key, size in sizes.items():
        names = list(dict.fromkeys(Key.parse(other).model for other, its_size in sizes.items() if its_size == size))
        place = names.index(Key.parse(key).model) - (len(names) - 1) / 2
        places[key] = size / 1e6 * 10 ** (BESIDE * place)
    return places


def _draw(axes: "Axes", points: Mapping[str, tuple[float, float, float, float]], style: dict[str, Any], label: str) -> None:
    """Draw one series of sizes, changes and intervals by key, with a line through the points of each seed."""
    size, value, low, high = zip(*points.values())
    errors = [[max(v - a, 0) for v, a in zip(value, low)], [max(b - v, 0) for v, b in zip(value, high)]]
    axes.errorbar(size, value, yerr=errors, **(style | {"linestyle": "none"}), markersize=7, capsize=3, label=label)
    for seed in {Key.parse(key).seed for key in points}:
        line = sorted(point[:2] for key, point in points.items() if Key.parse(key).seed == seed)
        axes.plot(*zip(*line), color=style["color"], linewidth=1, alpha=0.5, zorder=1)


def _name_tables(axes: "Axes", report: Report[PerplexityResult], keys: Iterable[str]) -> None:
    """Write above every size of a table which table it is."""
    names = {}
    for key in keys:
        parameters, ranks = report.results[key].parameters, Key.parse(key).ranks
        if parameters and (ranks or Key.parse(key).model == "baseline"):
            names[parameters.embedding / 1e6] = f"HTT {ranks[0]}" if ranks else "dense"
    for size, name in names.items():
        axes.axvline(size, color="#E4E4E4", linewidth=0.8, zorder=0)
        axes.annotate(
            name, (size, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8, color="#444444"
        )
