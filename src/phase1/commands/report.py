"""`phase1 report`: one HTML page of the results in a folder."""

from pathlib import Path
from typing import Any

from phase1.checks.regression import differences
from phase1.errors import Unavailable
from phase1.files import atomic_write
from phase1.page import NAME, page
from phase1.records.collect import Damage, read_reports, reports_at
from phase1.records.metrics import METRICS
from phase1.records.schema import FILES, Report
from phase1.runs import ReportRun
from phase1.tables.join import require_one_size
from phase1.tables.screen import Screen
from phase1.tables.screen import text as screen_text
from phase1.tables.training import trainings_in
from phase1.text import without_private


def main(run: ReportRun) -> int:
    """Write the page; see `ReportRun` for the flags.

    A damaged file is named and left out, and the exit status is 2. Raises Unavailable where there is no result file.
    """
    folder, damage = Path(run.results_dir), Damage("report")
    reports, trainings = read_reports(folder, damaged=damage, check=require_one_size), trainings_in(folder, damage)
    if damage.found and not reports and not any(training.rows for training in trainings):
        return damage.status
    if not reports and not trainings:
        raise Unavailable(
            f"no result file and no {METRICS} in {folder}; run phase1 pipeline or phase1 train first, or give --results-dir"
        )
    changes = None if run.against is None else differences(reports_at(run.against), reports)
    text = page(
        reports,
        trainings,
        changes,
        title=without_private(str(folder)),
        language=run.lang,
        files_of={FILES[kind]: (folder / FILES[kind]).read_bytes() for kind in reports},
        elsewhere=_elsewhere(folder),
    )
    out = folder / NAME if run.out is None else Path(run.out)
    atomic_write(out, text.encode())
    print(screen_text(screen(run, reports, len(trainings), out, len(text.encode()))))
    return damage.status


def screen(run: ReportRun, reports: dict[str, Report[Any]], trainings: int, out: Path, size: int) -> Screen:
    """What was written from what."""
    sources = [FILES[kind] for kind in reports]
    sources += [f"{trainings} training{'s' if trainings > 1 else ''}"] if trainings else []
    return Screen(
        question=f"Report on {', '.join(sources)} in {run.results_dir}",
        answer=f"one page of {size / 1e3:,.0f} kB: open it in a browser",
        files=[out],
    )


def _elsewhere(folder: Path) -> list[str]:
    """Folders below that have reports of their own."""
    return sorted({str(file.parent.relative_to(folder)) for name in FILES.values() for file in folder.glob(f"*/**/{name}")})
