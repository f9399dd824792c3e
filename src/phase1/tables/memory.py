"""The memory table, and that of the largest sizes that train."""

import re
from collections.abc import Sequence

from phase1.records.schema import Check, Fit, MemoryResult, Report
from phase1.roster import PIECE_LENGTH, PIECES
from phase1.tables.ablation import memory_ablation
from phase1.tables.breakdown import memory_breakdown
from phase1.tables.common import (
    BASIS,
    CONFIG,
    FAILED,
    MODEL,
    VERDICT,
    basis_of,
    caption_of,
    failures_of,
    gigabytes,
    hardware_of,
    headline,
    provenance_of,
    setting,
)
from phase1.tables.table import Cell, Column, Table

UNATTRIBUTED_LIMIT = 0.01  # of the peak; above it the breakdown is not to be trusted


def memory_tables(report: Report[MemoryResult], hardware: str | None = None) -> list[Table]:
    """The peaks; what they are made of, who saved what and what is the largest that fits, where the report says so."""
    tables = [memory_comparison(report, hardware)]
    if any(result.breakdown for result in report.results.values()):
        tables.append(memory_breakdown(report, hardware))
    if report.ablation:
        tables.append(memory_ablation(report, hardware))
    fits = fit_comparison(report, hardware)
    return tables if fits is None else [*tables, fits]


def memory_comparison(report: Report[MemoryResult], hardware: str | None = None) -> Table:
    """Peak memory of one training step per model, and whether it fits the cards that the report checked."""
    cards = [check for check in report.checks if check.name.startswith("fits_")]
    columns = (
        MODEL,
        BASIS,
        Column("Peak allocated", "GB"),
        Column("Peak allocated", "GiB"),
        Column("Reserved", "GB"),
        Column("With context", "GB"),
        Column("Forward peak", "GB"),
        Column("Backward peak", "GB"),
        Column("Optimizer peak", "GB"),
        Column("Reduction", "%", 1),
        *(Column(re.sub(r"fits_(\d+)gb", r"Fits \1 GB", check.name).replace("fits_", "Fits ")) for check in cards),
        CONFIG,
    )
    rows = tuple((key, *_memory_cells(key, result, cards), result.config_id) for key, result in report.results.items())
    sizes = (("B", "batch_size"), ("T", "seq_length"), ("engine in pieces of N", "piece_length"))
    conditions = (setting(report, symbol, name) for symbol, name in sizes)
    note = "Reduction: of peak allocated bytes, against baseline. Fits: reserved bytes with context, against the limit."
    return Table(
        "memory_comparison",
        caption_of("Peak memory of one training step", report, hardware, *conditions),
        hardware or hardware_of(report),
        columns,
        rows,
        (note, *_pieces_notes(report), *_breakdown_notes(report), *failures_of(report)),
        provenance_of(report),
    )


def _pieces_notes(report: Report[MemoryResult]) -> list[str]:
    """What the models that train in pieces are."""
    return [f"{key}: phase1 in pieces of {PIECE_LENGTH} tokens." for key in report.results if key in PIECES]


def _breakdown_notes(report: Report[MemoryResult]) -> list[str]:
    """What estimates assume, and a warning where the parts do not add up to the peak."""
    assumed = {result.assumptions: None for result in report.results.values() if result.assumptions}
    notes = [f"Estimated for {text}." for text in assumed]
    for key, result in report.results.items():
        peak, rest = result.peak_allocated_bytes, result.unattributed_bytes
        if peak and rest is not None and abs(rest) > UNATTRIBUTED_LIMIT * peak:
            share = f"{rest / 1e6:,.0f} MB, {100 * rest / peak:.1f} % of the peak"
            notes.append(f"Warning: {key}: {share}, belong to no part of the breakdown.")
    return notes


def _memory_cells(key: str, result: MemoryResult, cards: list[Check]) -> tuple[Cell, ...]:
    peak, reserved, outside = result.peak_allocated_bytes, result.peak_reserved_bytes, result.outside_allocator_bytes
    needed = result.estimated_needed_bytes if reserved is None or outside is None else reserved + outside
    basis = "estimated" if reserved is None and needed is not None else result.basis
    suffix = "" if basis == "measured" else f" ({basis})"

    def fits(check: Check) -> Cell:
        if key == "phase1":  # the check is about this model and knows more, such as the free memory of the card
            return check.status.upper() + suffix
        if needed is None or check.limit is None:
            return None
        return VERDICT[needed <= check.limit] + suffix

    return (
        result.basis,
        headline(result, gigabytes(peak)),
        headline(result, None if peak is None else peak / 2**30),
        gigabytes(reserved),
        gigabytes(needed),
        gigabytes(result.peak_forward_bytes),
        gigabytes(result.peak_backward_bytes),
        gigabytes(result.peak_optimizer_bytes),
        result.memory_reduction_percent,
        *(fits(check) for check in cards),
    )


def fit_comparison(report: Report[MemoryResult], hardware: str | None = None) -> Table | None:
    """The largest batch and the longest sequence of every model that `--fit` searched; None where it was not asked for."""
    searched = {key: result.fit for key, result in report.results.items() if result.fit}
    if not searched:
        return None
    limit = next(iter(searched.values()))[0].limit_bytes
    columns = (
        MODEL,
        BASIS,
        Column(f"Largest batch at T = {report.run.get('seq_length')}"),
        Column("Longest sequence at B = 1"),
        Column("Probes"),
        CONFIG,
    )
    rows = tuple(
        (
            key,
            fits[0].basis,
            *sizes_of(fits),
            sum(len(fit.probes) for fit in fits),
            report.results[key].config_id,
        )
        for key, fits in searched.items()
    )
    told = [(key, fit) for key, fits in searched.items() for fit in fits if fit.detail]
    notes = [f"{key}: {FAILED.get(fit.status, 'lower limit')}, {fit.detail}" for key, fit in told]
    steps = ", ".join(f"{fit.searched} by {fit.step}" for fit in next(iter(searched.values())))
    notes.append(f"Sizes that train: {steps}; one step more does not. >= where the search ended at its bound.")
    card = "whole card" if limit is None else f"{limit / 1e9:.2f} GB of the card"
    caption = caption_of("Largest sizes that train", report, hardware, card)
    return Table("fit_comparison", caption, hardware or hardware_of(report), columns, rows, tuple(notes))


def cards_comparison(reports: Sequence[Report[MemoryResult]]) -> Table:
    """The largest sizes that train on each of some cards, from a report of `--card NAME --fit` each.

    Raises ValueError (one line) for a report of none, or of another length than the first.
    """
    models = dict.fromkeys(key for report in reports for key, result in report.results.items() if result.fit)
    lengths = {report.run.get("seq_length") for report in reports}
    if len(lengths) != 1 or not all(report.run.get("card_name") for report in reports):
        raise ValueError("reports of cards must be of phase1 memory --card NAME --fit with one --seq-length; correct the list")
    sizes = [f"Batch at T = {lengths.pop():,}", "T at B = 1"]
    columns = (Column("Card"), Column("Usable", "GB", 1), *(Column(f"{size}: {key}") for size in sizes for key in models))
    rows = tuple(_card_row(report, list(models)) for report in reports)
    notes = ("Usable: 90 % of the size on the box; the rest is for driver, desktop and other programs.",)
    basis = basis_of(result for report in reports for result in report.results.values())
    caption = f"Largest sizes that train ({basis})"
    return Table(name="cards_comparison", caption=caption, hardware="", columns=columns, rows=rows, notes=notes)


def _card_row(report: Report[MemoryResult], models: list[str]) -> tuple[Cell, ...]:
    fits = [report.results[key].fit if key in report.results else [] for key in models]
    limit = next((fit.limit_bytes for found in fits for fit in found), None)
    return (str(report.run["card_name"]), gigabytes(limit), *(size for sizes in zip(*map(sizes_of, fits)) for size in sizes))


def sizes_of(fits: Sequence[Fit]) -> list[Cell]:
    """The largest batch and the longest sequence; None for what was not searched."""
    found = {fit.searched: size_cell(fit) for fit in fits}
    return [found.get("batch_size"), found.get("seq_length")]


def size_cell(fit: Fit) -> Cell:
    """The largest size of a search, or why there is none."""
    size = fit.batch_size if fit.searched == "batch_size" else fit.seq_length
    if fit.status != "ok" or size is None:
        return FAILED.get(fit.status)
    return f">= {size:,}" if size == fit.bound or fit.detail else size
