"""Reports -> what a command prints: the comparison tables without what the command line says already."""

import textwrap
from collections.abc import Iterable
from dataclasses import replace

from phase1.files import one_line
from phase1.record import Check, MemoryResult, PerplexityResult, Report, ThroughputResult
from phase1.tables import Table, console, memory_tables, perplexity_comparison, scaling_comparison, throughput_comparison


def memory_text(report: Report[MemoryResult]) -> str:
    """The peaks of every model and whether they fit, what they are made of, and what each component saves."""
    return "\n\n".join(_console(table, report) for table in memory_tables(report))


def throughput_text(report: Report[ThroughputResult]) -> str:
    """The speeds at every length, then how the times scale."""
    speeds = throughput_comparison(report)
    keep = [i for i, column in enumerate(speeds.columns) if column.title not in ("Basis", "Config id")]
    speeds = replace(
        speeds, columns=tuple(speeds.columns[i] for i in keep), rows=tuple(tuple(row[i] for i in keep) for row in speeds.rows)
    )
    return f"{_console(speeds, report)}\n\n{_console(scaling_comparison(report), report)}"


def perplexity_text(report: Report[PerplexityResult]) -> str:
    """The quality of every model."""
    return _console(perplexity_comparison(report), report)


def _console(table: Table, report: Report) -> str:
    """Without the checks, which `checks_text` prints, and the command, which the user has typed."""
    printed_elsewhere = tuple(f"{check.status.upper()} {check.name}: " for check in report.checks) + ("Command: ",)
    notes = tuple(note for note in table.notes if not note.startswith(printed_elsewhere))
    return console(replace(table, notes=notes))


def checks_text(checks: Iterable[Check]) -> str:
    """PASS, FAIL or INCONCLUSIVE for every check, with its value, limit and reason."""
    from tabulate import tabulate

    rows = [
        (check.status.upper(), one_line(check.name), _number(check.value), _number(check.limit), _wrapped(check.detail))
        for check in checks
    ]
    return "\n" + tabulate(rows, headers=("", "check", "value", "limit", ""), tablefmt="simple", disable_numparse=True) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:,.2f}e9" if abs(value) >= 1e9 else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(one_line(text, 1000), 72))
