"""Reports -> comparison tables, in Markdown, CSV, LaTeX and for the console. Needs no torch."""

from collections.abc import Mapping
from typing import Any

from phase1.records.schema import Report
from phase1.tables.configuration import configuration_comparison
from phase1.tables.decoding import decoding_comparison
from phase1.tables.join import require_one_size
from phase1.tables.losses import loss_comparison
from phase1.tables.memory import memory_comparison, memory_tables
from phase1.tables.perplexity import perplexity_comparison
from phase1.tables.table import SUFFIXES, Column, Table, render
from phase1.tables.throughput import scaling_comparison, throughput_comparison

__all__ = [
    "NAMES",
    "SUFFIXES",
    "Column",
    "Table",
    "build_tables",
    "configuration_comparison",
    "decoding_comparison",
    "loss_comparison",
    "memory_comparison",
    "memory_tables",
    "perplexity_comparison",
    "render",
    "scaling_comparison",
    "throughput_comparison",
]


NAMES = (
    "memory_comparison", "memory_breakdown", "memory_ablation", "fit_comparison", "throughput_comparison", "scaling_comparison",
    "decoding_comparison", "perplexity_comparison", "loss_comparison", "configuration_comparison",
    "training_comparison", "training_course",
)  # fmt: skip
"""Names of all tables: a file of such a name that this run did not write belongs to other results."""


def build_tables(reports: Mapping[str, Report[Any]], hardware: str | None = None) -> list[Table]:
    """Every table that the reports, by kind, allow. `hardware` replaces the name in the records.

    Raises ValueError (one line) where results that claim to be of one model or one size are not.
    """
    for report in reports.values():
        require_one_size(report)
    tables = []
    if "memory" in reports:
        tables += memory_tables(reports["memory"], hardware)
    if "throughput" in reports:
        tables.append(throughput_comparison(reports["throughput"], hardware))
        tables.append(scaling_comparison(reports["throughput"], hardware))
        decoding = decoding_comparison(reports["throughput"], hardware)
        tables += [decoding] if decoding.rows else []  # where --decode asked for it
    if "perplexity" in reports:
        tables.append(perplexity_comparison(reports["perplexity"], hardware))
        losses = loss_comparison(reports["perplexity"], hardware)
        tables += [losses] if losses.rows else []  # none in reports of earlier versions
    if reports:
        tables.append(configuration_comparison(reports, hardware))
    return tables
