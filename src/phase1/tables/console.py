"""Tables as a command prints them, without what the command line already says."""

import textwrap
from collections.abc import Iterable
from dataclasses import replace

from phase1.records.schema import Check, MemoryResult, PerplexityResult, Report, ThroughputResult
from phase1.tables import (
    Table,
    loss_comparison,
    memory_tables,
    perplexity_comparison,
    scaling_comparison,
    throughput_comparison,
)
from phase1.tables.grid import grid
from phase1.tables.table import is_wide
from phase1.text import one_line


def memory_text(report: Report[MemoryResult]) -> str:
    """The peaks of every model and whether they fit, what they are made of, who saves what, and what is largest."""
    return "\n\n".join(console(table) for table in memory_tables(report))


def throughput_text(report: Report[ThroughputResult]) -> str:
    """The speeds at every length without the parts of a step, how the times scale, and what makes them doubtful."""
    speeds = throughput_comparison(report)
    warnings = (_paragraph(f"WARNING {text}") for text in speeds.provenance.warnings)
    return "\n".join([console(speeds), "", console(scaling_comparison(report)), *warnings])


def perplexity_text(report: Report[PerplexityResult]) -> str:
    """The quality of every model, then where it loses."""
    losses = loss_comparison(report)
    return console(perplexity_comparison(report)) + (f"\n\n{console(losses)}" if losses.rows else "")


def checks_text(checks: Iterable[Check]) -> str:
    """PASS, FAIL or INCONCLUSIVE for every check, with its value, limit and reason."""
    rows = [
        (check.status.upper(), one_line(check.name), _number(check.value), _number(check.limit), _wrapped(check.detail))
        for check in checks
    ]
    return "\n" + grid(("", "check", "value", "limit", ""), rows, [False] * 5) + "\n"


def _paragraph(text: str) -> str:
    return "\n" + textwrap.fill(one_line(text, 1000), 120, subsequent_indent="  ")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:,.2f}e9" if abs(value) >= 1e9 else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(one_line(text, 1000), 72))


def console(table: Table) -> str:
    """The table for a terminal: caption, rows (a few models with many numbers stand side by side) and notes.

    Its provenance is not here: the user has typed the command, and a command prints checks and warnings once.
    """
    table = _without_columns_of_files(table)
    headings = [column.heading for column in table.columns]
    rows = table.texts(one_line)
    if is_wide(table):
        rows = [list(row) for row in zip(headings, *rows)]
        headings, rows = rows[0], rows[1:]
        right = [False] + [True] * (len(headings) - 1)
    else:
        headings = ["\n".join(textwrap.wrap(heading, 12)) for heading in headings]
        right = [table.is_numeric(i) for i in range(len(headings))]
    body = grid(headings, rows, right)
    return "\n".join([one_line(table.caption), "", body, *(f"- {one_line(note)}" for note in table.notes)])


def _without_columns_of_files(table: Table) -> Table:
    keep = [i for i, column in enumerate(table.columns) if column.console]
    rows = tuple(tuple(row[i] for i in keep) for row in table.rows)
    return replace(table, columns=tuple(table.columns[i] for i in keep), rows=rows)
