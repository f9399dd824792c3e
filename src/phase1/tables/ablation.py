"""The table of the memory ablation: one component changed at a time."""

from phase1.records.schema import MemoryResult, Report
from phase1.tables.common import MODEL, caption_of, gigabytes, hardware_of, setting
from phase1.tables.table import Column, Table

NOTE = "A component whose change of the baseline is not the opposite of its change of phase1 shares its saving with another."


def memory_ablation(report: Report[MemoryResult], hardware: str | None = None) -> Table:
    """The peak of every variant, and its change against the model it comes from."""
    numbers = (Column("Peak allocated", "GB", 3), Column("Difference", "GB", 3), Column("Difference", "%", 1))
    rows = []
    for row in report.ablation:
        reference = report.results[row.from_role].peak_allocated_bytes if row.from_role in report.results else None
        percent = 100 * row.change_bytes / reference if row.change_bytes is not None and reference else None
        cells = (gigabytes(row.peak_allocated_bytes), gigabytes(row.change_bytes), percent)
        rows.append((row.from_role, row.name, *cells, row.detail))
    sizes = (("B", "batch_size"), ("T", "seq_length"), ("engine in pieces of N", "piece_length"))
    conditions = (setting(report, symbol, name) for symbol, name in sizes)
    return Table(
        "memory_ablation",
        caption_of("Peak memory with one component changed", report, hardware, *conditions),
        hardware or hardware_of(report),
        (MODEL, Column("Change"), *numbers, Column("Detail")),
        tuple(rows),
        (NOTE,),
    )
