"""`phase1 tables`: comparison tables from the result files of the other commands."""

import sys
from dataclasses import replace
from pathlib import Path

from phase1.config import flags
from phase1.errors import Unavailable
from phase1.files import atomic_write
from phase1.records.collect import Damage, read_reports
from phase1.records.metrics import METRICS
from phase1.records.schema import FILES, Kind
from phase1.runs import TablesRun
from phase1.tables import NAMES, SUFFIXES, build_tables, render
from phase1.tables.join import require_one_size
from phase1.tables.results_page import generated
from phase1.tables.screen import Screen
from phase1.tables.screen import text as screen_text
from phase1.tables.training import training_tables, trainings_in
from phase1.text import one_line


def main(run: TablesRun) -> int:
    """Write every table that the result files allow and name them; missing and damaged files are named and skipped.

    The exit status is 2 where one is damaged. Raises ValueError for --results-page with any other flag and for result files
    that contradict each other, Unavailable where there is none; no table is touched then.
    """
    if run.results_page:
        if others := flags(replace(run, results_page=False)):
            raise ValueError(f"--results-page writes into the checkout alone; got {others}; leave one of them out")
        return _results_page(Path())
    results, damage = Path(run.results_dir), Damage("tables")
    trainings = training_tables(trainings_in(results, damage))
    reports = read_reports(results, _missing, damage, require_one_size)
    if damage.found and not reports and not trainings:
        return damage.status
    if not reports and not trainings:
        raise Unavailable(
            f"no result file in {results}; run phase1 memory, throughput or perplexity first, or give --results-dir"
        )
    out = results / "tables" if run.out_dir is None else Path(run.out_dir)
    tables = build_tables(reports, run.hardware) + trainings
    files = {
        out / f"{table.name}{SUFFIXES[form]}": render(table, form) for table in tables for form in dict.fromkeys(run.formats)
    }
    for path, content in files.items():  # all rendered before the first is written
        atomic_write(path, content.encode())
    older = [path for name in NAMES for suffix in SUFFIXES.values() if (path := out / f"{name}{suffix}") not in files]
    for path in () if damage.found else filter(Path.exists, older):  # those of a damaged file may be of these results
        print(one_line(f"not of these results: {path} is of an earlier run; remove it", 2000), file=sys.stderr)
    if run.verbose:
        print("\n".join(render(table, "markdown") for table in tables))
    print(screen_text(screen(run, [table.name for table in tables], [FILES[kind] for kind in reports] or [METRICS], out)))
    return damage.status


def _results_page(root: Path) -> int:
    """Write the files of the checkout at `root` that show results; ValueError where it is none, before any is written."""
    files = generated(root)
    for path, content in files.items():
        atomic_write(path, content.encode())
    written = [f"written: {path}" for path in files]
    print(screen_text(Screen("Documents from the records under results/", written, answer=f"{len(files)} documents written")))
    return 0


def screen(run: TablesRun, names: list[str], sources: list[str], out: Path) -> Screen:
    """What was written from what."""
    suffixes = " ".join(SUFFIXES[form] for form in dict.fromkeys(run.formats))
    return Screen(
        question=f"Tables from {', '.join(sources)} in {run.results_dir}",
        numbers=[f"written: {out / name}  {suffixes}" for name in names],
        answer=f"{len(names)} tables written",
    )


def _missing(kind: Kind, path: Path) -> None:
    print(one_line(f"missing, skipped: {path} (make it with phase1 {kind})", 2000), file=sys.stderr)
