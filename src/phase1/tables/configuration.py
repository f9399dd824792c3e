"""The table that joins all reports by configuration."""

from collections.abc import Mapping
from typing import Any

from phase1.records.schema import MemoryResult, PerplexityResult, Report, Result, ThroughputResult
from phase1.roster import CONTROLS
from phase1.tables.common import CONFIG, MODEL, gigabytes, hardware_named, headline
from phase1.tables.join import Row, joined_rows
from phase1.tables.perplexity import perplexity_cells
from phase1.tables.table import Cell, Column, Provenance, Table
from phase1.tables.throughput import ratio_to_baseline


def configuration_comparison(reports: Mapping[str, Report[Any]], hardware: str | None = None) -> Table:
    """One row per model with its memory, speed and quality, each from a report of that same model; no controls."""
    columns = (
        MODEL,
        CONFIG,
        Column("Baseline id"),
        Column("Parameters"),
        Column("Peak allocated", "GB"),
        Column("Memory basis"),
        Column("Reduction", "%", 1),
        Column("Throughput", "tokens/s", 0),
        Column("At T", "tokens"),
        Column("Speed basis"),
        Column("Ratio to baseline", "x"),
        Column("Scaling"),
        Column("Perplexity"),
        Column("Trained on", "tokens"),
        Column("Degradation", "%"),
        Column("Within 5 %"),
    )
    names = {kind: hardware_named(report, hardware) for kind, report in reports.items()}
    shared = len(set(names.values())) == 1
    label = next(iter(names.values())) if shared else "; ".join(f"{kind}: {name}" for kind, name in names.items())
    missing = [kind for kind in ("memory", "throughput", "perplexity") if kind not in reports]
    notes = [
        "A row is one configuration against one baseline; numbers of others are in other rows; n/a: not measured.",
        *([f"Not measured: {', '.join(missing)}."] if missing else []),
    ]
    commands = tuple(f"Command, {kind}: {report.command} ({report.created_utc})" for kind, report in reports.items())
    rows = tuple(_configuration_cells(row, reports) for row in joined_rows(reports) if row.label not in CONTROLS)
    provenance = Provenance(commands=commands)
    return Table("configuration_comparison", f"Configurations: {label}", label, columns, rows, tuple(notes), provenance)


def _configuration_cells(row: Row, reports: Mapping[str, Report[Any]]) -> tuple[Cell, ...]:
    return (
        row.label,
        row.config_id,
        row.baseline_id,
        row.parameters,
        *_memory_summary(row.results.get("memory")),
        *_speed_summary(row.results.get("throughput"), reports.get("throughput")),
        *_quality_summary(row.results.get("perplexity"), row.label),
    )


def _memory_summary(result: Result | None) -> tuple[Cell, ...]:
    if not isinstance(result, MemoryResult):
        return (None,) * 3
    return (headline(result, gigabytes(result.peak_allocated_bytes)), result.basis, result.memory_reduction_percent)


def _speed_summary(result: Result | None, report: Report[ThroughputResult] | None) -> tuple[Cell, ...]:
    """The speed at the longest length that this model ran, with the ratio if the baseline ran it too."""
    if not isinstance(result, ThroughputResult) or report is None:
        return (None,) * 5
    verdict = result.scaling.verdict if result.scaling else None
    measured = [m for m in result.measurements if m.status == "ok" and m.tokens_per_second]
    if not measured:
        return (headline(result, "FAIL"), None, result.basis, None, verdict)
    longest = max(measured, key=lambda m: m.seq_length)
    return (longest.tokens_per_second, longest.seq_length, result.basis, ratio_to_baseline(report, longest), verdict)


def _quality_summary(result: Result | None, label: str) -> tuple[Cell, ...]:
    if not isinstance(result, PerplexityResult):
        return (None,) * 4
    cells = perplexity_cells(label, result)
    return (cells.perplexity, cells.trained_tokens, cells.degradation, cells.verdict)
