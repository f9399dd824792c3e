"""What every comparison table has: columns of identity, caption, conditions, failures and checks."""

from collections.abc import Iterable
from typing import Any

from phase1.records.schema import Check, Report, Result
from phase1.tables.table import Cell, Column, Provenance

FAILED = {"oom": "OOM", "error": "FAIL"}
VERDICT = {True: "PASS", False: "FAIL", None: "INCONCLUSIVE"}
MODEL = Column("Model")
CONFIG = Column("Config id")
BASIS = Column("Basis")


def hardware_of(report: Report[Any]) -> str:
    """The GPU, or the processor, that the record names."""
    facts = report.environment
    if report.results and all(result.basis == "estimated" for result in report.results.values()):
        card = report.run.get("card_name")
        return f"{f'{card}, ' if card else ''}estimated on {_processor(report)}"
    memory = facts.get("gpu_memory_bytes")
    if facts.get("gpu"):
        return f"{facts['gpu']}, {memory / 1e9:.1f} GB" if isinstance(memory, int | float) else str(facts["gpu"])
    return _processor(report)


def _processor(report: Report[Any]) -> str:
    facts = report.environment
    cores = facts.get("cpu_cores")
    return f"{facts.get('cpu') or 'unknown processor'} (CPU{f', {cores} cores' if cores else ''})"


def basis_of(results: Iterable[Result]) -> str:
    """How the results are known: measured, estimated or emulated, or several of these."""
    return ", ".join(sorted({result.basis for result in results})) or "no result"


def gigabytes(count: int | None) -> float | None:
    """GB are 10^9 bytes."""
    return None if count is None else count / 1e9


def headline(result: Result, value: Cell) -> Cell:
    """The main number of a result, or the word for its failure."""
    return FAILED.get(result.status, value)


def _check_notes(checks: Iterable[Check]) -> list[str]:
    return [f"{check.status.upper()} {check.name}: {_against(check)}{check.detail}" for check in checks]


def _against(check: Check) -> str:
    numbers = [f"{name} {_number(n)}" for name, n in (("value", check.value), ("limit", check.limit)) if n is not None]
    return f"{', '.join(numbers)}; " if numbers else ""


def _number(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1e5 else f"{number:.5g}"


def failures_of(report: Report[Any]) -> tuple[str, ...]:
    """Every model that failed, with its reason."""
    return tuple(f"{key}: {FAILED[r.status]}, {r.detail}" for key, r in report.results.items() if r.status != "ok")


def provenance_of(report: Report[Any], warnings: Iterable[str] = ()) -> Provenance:
    """What disturbed the run, after `warnings` of single models; checks with their numbers; and the command."""
    command = f"Command: {report.command} ({report.created_utc})"
    return Provenance((*warnings, *report.warnings), tuple(_check_notes(report.checks)), (command,))


def caption_of(title: str, report: Report[Any], hardware: str | None, *conditions: str) -> str:
    """The caption: title, conditions, hardware, and how the numbers are known."""
    given = [text for text in conditions if text]
    basis = basis_of(report.results.values())
    return f"{title}: {', '.join([*given, hardware_named(report, hardware)])} ({basis})"


def hardware_named(report: Report[Any], hardware: str | None) -> str:
    """The recorded hardware; if the user gives another name, both, because the numbers stay those of the recorded machine."""
    recorded = hardware_of(report)
    return recorded if hardware in (None, recorded) else f"{hardware}, recorded on {recorded}"


def setting(report: Report[Any], symbol: str, name: str) -> str:
    """`symbol = value` of the run's setting `name`, empty where it has none."""
    return f"{symbol} = {report.run[name]}" if report.run.get(name) is not None else ""
