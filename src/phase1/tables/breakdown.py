"""The table of what the peak of a training step is made of."""

from phase1.records.schema import MemoryResult, Report
from phase1.tables.common import caption_of, gigabytes, hardware_of, setting
from phase1.tables.table import Cell, Column, Table

TOP = 5  # modules named per model; the record has more


def memory_breakdown(report: Report[MemoryResult], hardware: str | None = None) -> Table:
    """Bytes of every part at the peak, a column per model, down to what the card must hold in all."""
    done = {key: result for key, result in report.results.items() if result.peak_allocated_bytes is not None}
    parts = dict.fromkeys(part for result in done.values() for part in result.breakdown)
    rows: list[tuple[Cell, ...]] = [
        (part.replace("_", " "), *(gigabytes(result.breakdown.get(part)) for result in done.values())) for part in parts
    ]
    for name, field in (
        ("unattributed", "unattributed_bytes"),
        ("= peak allocated", "peak_allocated_bytes"),
        ("fragmentation (reserved - allocated)", "fragmentation_bytes"),
        ("context (outside the allocator)", "outside_allocator_bytes"),
    ):
        rows.append((name, *(gigabytes(getattr(result, field)) for result in done.values())))
    notes = [f"{key}, largest modules at the peak: {_largest(result)}" for key, result in done.items() if result.top_modules]
    sizes = (("B", "batch_size"), ("T", "seq_length"), ("engine in pieces of N", "piece_length"))
    conditions = (setting(report, symbol, name) for symbol, name in sizes)
    return Table(
        "memory_breakdown",
        caption_of("What the peak of a training step is made of", report, hardware, *conditions),
        hardware or hardware_of(report),
        (Column("Part"), *(Column(key, "GB", 3) for key in done)),
        tuple(rows),
        tuple(notes),
    )


def _largest(result: MemoryResult) -> str:
    return ", ".join(f"{module} {count / 1e9:.2f} GB" for module, count in list(result.top_modules.items())[:TOP])
