"""The table of generation: tokens per second and bytes of the state over contexts."""

from phase1.records.schema import Report, ThroughputResult
from phase1.tables.common import MODEL, caption_of, hardware_of
from phase1.tables.table import Cell, Column, Interval, Table


def decoding_comparison(report: Report[ThroughputResult], hardware: str | None = None) -> Table:
    """A row for every model and context; no row where generation was not measured."""
    rows: list[tuple[Cell, ...]] = []
    notes = []
    for key, result in report.results.items():
        if result.decoding is None:
            continue
        for point in result.decoding.points:
            decode = (point.decode_tokens_per_second, Interval.of(point.decode_tokens_per_second_ci95))
            speeds = (point.prefill_tokens_per_second, *decode)
            rows.append((key, point.context, *speeds, point.state_bytes / 1e6))
        interval = result.decoding.speed_ratio_ci95
        between = "" if interval is None else f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
        notes.append(f"{key}: {result.decoding.verdict}, longest over shortest {result.decoding.speed_ratio:.3f}{between}")
    return Table(
        "decoding_comparison",
        caption_of("Generation", report, hardware, "B = 1", "CUDA graphs" if report.run.get("cuda_graphs") else ""),
        hardware or hardware_of(report),
        (
            MODEL, Column("Context", "tokens"), Column("Prefill", "tokens/s", 0), Column("Decode", "tokens/s", 1),
            Column("95 %", "tokens/s", 1, interval=True), Column("State", "MB", 3),
        ),
        tuple(rows),
        tuple(notes),
    )  # fmt: skip
