"""`phase1 tables`: comparison tables from the result files of the other commands."""

import sys
from pathlib import Path
from typing import Any

from phase1.errors import Unavailable
from phase1.files import atomic_write
from phase1.records.schema import FILES, Kind, Report, read_report
from phase1.runs import TablesRun
from phase1.tables import SUFFIXES, build_tables, render
from phase1.text import one_line

KINDS: tuple[Kind, ...] = ("memory", "throughput", "perplexity")


def main(run: TablesRun) -> int:
    """Write every table that the result files allow and print them; missing files are named and skipped.

    Raises ValueError for a corrupt or foreign result file, Unavailable where there is none; no table is touched then.
    """
    reports = read_reports(Path(run.results_dir))
    tables = build_tables(reports, run.hardware)
    files = {
        Path(run.out_dir) / f"{table.name}{SUFFIXES[form]}": render(table, form)
        for table in tables
        for form in dict.fromkeys(run.formats)
    }
    for path, text in files.items():  # all rendered before the first is written
        atomic_write(path, text.encode())
    print("\n".join(render(table, "markdown") for table in tables))
    print(*(f"written: {path}" for path in files), sep="\n")
    return 0


def read_reports(folder: Path) -> dict[str, Report[Any]]:
    """The reports in `folder`, by kind."""
    reports: dict[str, Report[Any]] = {}
    for kind in KINDS:
        path = folder / FILES[kind]
        if path.exists():
            reports[kind] = read_report(path, kind)
        else:
            print(one_line(f"missing, skipped: {path} (make it with phase1 {kind})", 2000), file=sys.stderr)
    if not reports:
        raise Unavailable(
            f"no result file in {folder}; run phase1 memory, throughput or perplexity first, or give --results-dir"
        )
    return reports
