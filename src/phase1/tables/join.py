"""Which results of several reports are of one model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from phase1.config import ModelConfig, present_settings
from phase1.records.schema import Report, Result
from phase1.roster import Key

SIZES = ("vocab_size", "d_model", "n_layers")  # equal for all models of one comparison
IDENTITY = (*SIZES, "n_heads", "mixer", "embedding", "loss", "recompute")  # equal wherever the config id is


@dataclass
class Row:
    """One model in one comparison: its results by kind of report."""

    label: str
    config_id: str
    baseline_id: str | None
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def parameters(self) -> int | None:
        return next((result.parameters.total for result in self.results.values() if result.parameters), None)


def require_one_size(report: Report[Any]) -> None:
    """Raise ValueError if the engine and the baselines of a report differ in size, so that their ratios mean nothing."""
    sizes = {
        key: {name: result.config[name] for name in SIZES if name in result.config}
        for key, result in report.results.items()
        if Key.parse(key).is_engine or Key.parse(key).is_baseline
    }
    for key, size in sizes.items():
        reference, expected = next(iter(sizes.items()))
        if any(expected.get(name, value) != value for name, value in size.items()):
            raise ValueError(
                f"the {report.kind} report compares models of different sizes: expected {expected} for {key}, "
                f"as for {reference}; got {size}; run phase1 {report.kind} again"
            )


def joined_rows(reports: Mapping[str, Report[Any]]) -> list[Row]:
    """One row per model and baseline, in the order of the reports; a row holds at most one result per kind.

    Results are of one row when label and configuration id are equal and they were compared with the same baseline. A result
    that was compared with none joins the row of its configuration where there is exactly one. Where no row has the id, a
    perplexity joins that of the model with another --recompute: it is the same model, trained faster or in less memory.
    Raises ValueError where one configuration id stands for two configurations.
    """
    rows: list[Row] = []
    for with_baseline in (True, False):
        for kind, report in reports.items():
            baseline = report.results.get("baseline")
            if (baseline is not None) == with_baseline:
                for key, result in report.results.items():
                    baseline_id = baseline.config_id if baseline else None
                    _row_for(rows, _label(key), result, baseline_id, kind).results[kind] = result
    for row in rows:
        _require_one_configuration(row)
    return rows


def _label(key: str) -> str:
    """The name of a row: without ranks for engines, which the configuration id tells apart."""
    return Key.parse(key).name if Key.parse(key).is_engine else key


def _row_for(rows: list[Row], label: str, result: Result, baseline_id: str | None, kind: str) -> Row:
    free = [row for row in rows if row.label == label and kind not in row.results]
    if baseline_id is not None:
        free = [row for row in free if row.baseline_id == baseline_id]
    found = [row for row in free if row.config_id == result.config_id]
    found = found or [row for row in free if _has_weights_of(row, result, kind)]
    if len(found) != 1:
        rows.append(Row(label, result.config_id, baseline_id))
        return rows[-1]
    if kind != "perplexity":  # what it costs depends on the way it is trained
        found[0].config_id = result.config_id
    return found[0]


def _has_weights_of(row: Row, result: Result, kind: str) -> bool:
    """Whether one of the two is a perplexity alone, of the model of the other but for --recompute."""
    if kind != "perplexity" and set(row.results) != {"perplexity"}:
        return False
    one, other = (_recomputed_id(config) for config in (result.config, next(iter(row.results.values())).config))
    return one is not None and one == other


def _recomputed_id(config: Mapping[str, Any]) -> str | None:
    try:
        return replace(ModelConfig(**present_settings(config)), recompute="block").config_id
    except (TypeError, ValueError):  # of another version or another program: its id has to do
        return None


def _require_one_configuration(row: Row) -> None:
    (first_kind, first), *others = row.results.items()
    for kind, other in others:
        names = [name for name in IDENTITY if name != "recompute" or first.config_id == other.config_id]
        mine, theirs = present_settings(first.config), present_settings(other.config)
        differing = [n for n in names if n in mine and n in theirs and mine[n] != theirs[n]]
        if first.parameters and other.parameters and first.parameters != other.parameters:
            differing.append("parameters")
        if differing:
            raise ValueError(
                f"expected one model for config id {row.config_id}; got two in the {first_kind} and {kind} reports, "
                f"which differ in {', '.join(differing)}; run phase1 {kind} again"
            )
