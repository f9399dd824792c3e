"""The throughput table, and the scaling table from the same report."""

from dataclasses import replace
from typing import cast

from phase1.records.schema import Measurement, Report, ThroughputResult
from phase1.tables.common import (
    BASIS,
    CONFIG,
    FAILED,
    MODEL,
    caption_of,
    failures_of,
    gigabytes,
    hardware_of,
    headline,
    provenance_of,
    setting,
)
from phase1.tables.table import Cell, Column, Interval, Table

DEFINITIONS = (
    "Throughput: B T / median step, with its 95 % interval; a step is forward, loss, backward, clipping and optimizer.",
    "Ratio: from the pairs of steps of one round, with its 95 % interval; it may differ a little from that of the medians.",
    "MFU: FLOPs of the matrix products of a step, nothing computed twice, attention over all T x T pairs, over step seconds x "
    "the card's peak. Optimizer traffic: 20 bytes per parameter, the least that one moment makes it move, over its seconds.",
)


def throughput_comparison(report: Report[ThroughputResult], hardware: str | None = None) -> Table:
    """Tokens per second and the parts of a step, per length and model; the ratio is to `baseline` at the same size."""
    columns = (
        Column("T", "tokens"),
        MODEL,
        Column("Batch"),
        replace(BASIS, console=False),
        Column("Throughput", "tokens/s", 0),
        Column("95 %", "tokens/s", 0, interval=True),
        Column("Ratio to baseline", "x", 3),
        Column("95 %", "x", 3, interval=True),
        Column("Step", "ms"),
        Column("Forward", "ms", console=False),
        Column("Backward", "ms", console=False),
        Column("Optimizer", "ms", console=False),
        Column("Model FLOPs", "GFLOP/s", 0, console=False),
        Column("MFU", "%", 1),
        Column("Optimizer traffic", "GB/s", 0, console=False),
        Column("Peak allocated", "GB"),
        replace(CONFIG, console=False),
    )
    rows = []
    for key, result in report.results.items():
        for m in result.measurements:
            head: tuple[Cell, ...] = (m.seq_length, key, m.batch_size, result.basis)
            speed = (FAILED.get(m.status, m.tokens_per_second), Interval.of(m.tokens_per_second_ci95))
            ratio = (ratio_to_baseline(report, m), Interval.of(m.ratio_ci95))
            times = (m.total_time_ms, m.forward_time_ms, m.backward_time_ms, m.optimizer_time_ms)
            rows.append((*head, *speed, *ratio, *times, *_efficiency(m), gigabytes(m.peak_allocated_bytes), result.config_id))
    return Table(
        "throughput_comparison",
        caption_of(
            "Training throughput",
            report,
            hardware,
            setting(report, "precision", "precision"),
            setting(report, "engine in pieces of N", "piece_length"),
        ),
        hardware or hardware_of(report),
        columns,
        tuple(sorted(rows, key=lambda row: cast(int, row[0]))),  # stable: models keep their order within a length
        (*DEFINITIONS, *_remarks(report), *failures_of(report)),
        provenance_of(report, [f"{key}: {text}" for key, result in report.results.items() for text in result.warnings]),
    )


def _efficiency(m: Measurement) -> tuple[Cell, ...]:
    flops, traffic = m.achieved_flops_per_second, m.optimizer_bytes_per_second
    return (
        None if flops is None else flops / 1e9,
        None if m.mfu is None else 100 * m.mfu,
        None if traffic is None else traffic / 1e9,
    )


def _remarks(report: Report[ThroughputResult]) -> list[str]:
    """The peaks behind MFU, and failed lengths."""
    results = report.results
    peaks = sorted({f"Peak: {result.peak_basis}." for result in results.values() if result.peak_basis})
    failures = [
        f"{key} at T = {m.seq_length}: {FAILED[m.status]}, {m.detail}"
        for key, result in results.items()
        for m in result.measurements
        if m.status != "ok"
    ]
    return peaks + failures


def ratio_to_baseline(report: Report[ThroughputResult], m: Measurement) -> float | None:
    """The ratio in the record; of records before it had one, that of tokens per second at the same length and batch size."""
    if m.ratio_to_baseline is not None:
        return m.ratio_to_baseline
    base = baseline_speeds(report).get((m.seq_length, m.batch_size))
    return m.tokens_per_second / base if base and m.tokens_per_second else None


def baseline_speeds(report: Report[ThroughputResult]) -> dict[tuple[int, int], float | None]:
    """Tokens per second of the baseline by (length, batch size)."""
    baseline = report.results.get("baseline")
    return {(m.seq_length, m.batch_size): m.tokens_per_second for m in baseline.measurements} if baseline else {}


def scaling_comparison(report: Report[ThroughputResult], hardware: str | None = None) -> Table:
    """How the step time of each model grows with T, and the verdict with its reason."""
    columns = (
        MODEL,
        BASIS,
        Column("Lengths", "tokens"),
        Column("Order"),
        Column("R²", "", 4),
        Column("Coefficient", "µs per position", 3),
        Column("Exponent", "", 3),
        Column("95 %", "", 3, interval=True),
        Column("Quadratic share", "%", 1),
        Column("Verdict"),
        CONFIG,
    )
    rows, reasons = [], []
    for key, result in report.results.items():
        rows.append((key, result.basis, _lengths(result), *_scaling_cells(result), result.config_id))
        if result.scaling and result.scaling.detail:
            reasons.append(f"{key}: {result.scaling.detail}")
    definition = (
        "R² and coefficient: of t = a + b T. Exponent: of log t on log T over the top octaves. "
        "Quadratic share: of c T² in t = a + b T + c T² at the longest T, limit 15 %."
    )
    return Table(
        "scaling_comparison",
        caption_of("Step time against sequence length", report, hardware, setting(report, "B", "batch_size")),
        hardware or hardware_of(report),
        columns,
        tuple(rows),
        (definition, *reasons, *failures_of(report)),
        provenance_of(report),
    )


def _lengths(result: ThroughputResult) -> str:
    lengths = [m.seq_length for m in result.measurements if m.status == "ok"]
    return f"{min(lengths)} to {max(lengths)} ({len(lengths)})" if lengths else "none"


def _scaling_cells(result: ThroughputResult) -> tuple[Cell, ...]:
    fit = result.scaling
    if fit is None:
        return (None,) * 6 + (headline(result, "inconclusive"),)
    slope = None if fit.scaling_coefficient is None else fit.scaling_coefficient * 1e6
    share = None if fit.quadratic_share is None else fit.quadratic_share * 100
    return (fit.complexity_order, fit.r_squared, slope, fit.exponent, Interval.of(fit.exponent_ci95), share, fit.verdict)
