"""All reports of a folder, by kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

from phase1.files import read_json
from phase1.records.schema import FILES, Kind, Report, read_report
from phase1.text import one_line

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


def read_reports(path: Path, missing: Callable[[Kind, Path], object] = lambda kind, file: None) -> dict[str, Report[Any]]:
    """The report at `path`, or those in the folder `path`, by kind; `missing` is called for each kind that is not there.

    Raises ValueError for a corrupt or foreign file; a folder without any gives no report.
    """
    if not path.is_dir() and path.suffix:
        kind = _kind(path)
        return {kind: read_report(path, kind)}
    reports: dict[str, Report[Any]] = {}
    for kind in KINDS:
        file = path / FILES[kind]
        if file.exists():
            reports[kind] = read_report(file, kind)
        else:
            missing(kind, file)
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
