"""All reports of a folder, by kind."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

from phase1.files import read_json
from phase1.records.schema import FILES, Kind, Report, read_report
from phase1.text import one_line

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


def refused(error: ValueError) -> None:
    """What is done about a damaged file where all are needed."""
    raise error


class Damage:
    """What is done about a damaged file where the others are of use: one line names it, and `found` counts it."""

    def __init__(self, command: str) -> None:
        self.command, self.found = command, 0

    def __call__(self, error: ValueError) -> None:
        print(one_line(f"phase1 {self.command}: damaged: {error}", 2000), file=sys.stderr)
        self.found += 1

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return 2 if self.found else 0


def read_reports(
    path: Path,
    missing: Callable[[Kind, Path], object] = lambda kind, file: None,
    damaged: Callable[[ValueError], object] = refused,
    check: Callable[[Report[Any]], object] = lambda report: None,
) -> dict[str, Report[Any]]:
    """The report at `path`, or those in the folder `path`, by kind; `missing` is called for each kind that is not there.

    A corrupt or foreign file, or one that `check` refuses, is a ValueError, which `damaged` gets: by default it is raised.
    A single file always raises it, and a folder without any gives no report.
    """
    if not path.is_dir() and path.suffix:
        kind = _kind(path)
        return {kind: read_report(path, kind)}
    reports: dict[str, Report[Any]] = {}
    for kind in KINDS:
        file = path / FILES[kind]
        if not file.exists():
            missing(kind, file)
            continue
        try:
            report = read_report(file, kind)
            check(report)
            reports[kind] = report
        except ValueError as error:
            damaged(error)
    return reports


def reports_at(text: str) -> dict[str, Report[Any]]:
    """The reports at a path by kind; ValueError where there is none."""
    reports = read_reports(Path(text))
    if not reports:
        expected = f"expected a folder with {' or '.join(FILES.values())}"
        raise ValueError(f"{one_line(text)}: {expected}; got none of them; give the --out-dir of a run")
    return reports


def _kind(path: Path) -> Kind:
    """The kind that the file declares."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: expected a phase1 report; got {one_line(error)}; give a result file") from error
    named = content.get("kind") if isinstance(content, dict) else None
    for kind in KINDS:
        if named == kind:
            return kind
    raise ValueError(f"{one_line(path)}: expected a phase1 report; got the file of another program; give a result file")
