"""One run of a measuring command: its folder, its journal, and the report it ends with."""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from phase1.errors import reason
from phase1.files import absent, remove_empty
from phase1.machine.environment import Fact, current_command, deciding_settings, environment, machine, settings
from phase1.records.journal import Journal, open_journal
from phase1.records.schema import FILES, REPORTS, Check, Kind, Report, Result, read_report, write_report
from phase1.text import one_line
from phase1.world import is_first

T = TypeVar("T")
Plot = Callable[[Report[Any], Path], Path]
PREVIOUS: Final = ".previous"  # a report that another command had written where this one goes; then .previous-2, -3, ...


class Session:
    """One run of memory, throughput or perplexity: cases that survive an interrupt, then reports.

    `case` returns the value that an earlier run kept, or computes and keeps it; `write` makes a report; `close` ends the run.

    Args:
        run: the settings; `out_dir` and `resume` are read here.
        data: what identifies the data, as JSON; None if no case depends on any.
    Raises:
        OSError: nothing can be written into --out-dir. ValueError: --resume finds another run.
    """

    def __init__(self, run: Any, kind: Kind, data: Any = None) -> None:
        self.kind, self.path = kind, Path(run.out_dir) / FILES[kind]
        require_files(self.path.parent, (self.path.name,))
        require_writable(self.path.parent)
        self.settings = settings(run)
        deciding = deciding_settings(run)
        self.journal: Journal = open_journal(self.path, deciding, machine=machine(), resume=run.resume, data=data)
        self._facts: dict[str, Fact] | None = None

    @property
    def facts(self) -> dict[str, Fact]:
        """Facts of hardware and software, taken once and late: that makes a CUDA context, which a measurement would count."""
        if self._facts is None:
            self._facts = dict(environment())
        return self._facts

    def case(self, name: str, kind: Any, compute: Callable[[], T]) -> T:
        """The value of case `name`: see `Journal.case`."""
        return self.journal.case(name, kind, compute)

    def write(
        self,
        results: Mapping[str, Result],
        checks: Sequence[Check],
        plots: Sequence[tuple[Plot, str]] = (),
        folder: Path | None = None,
        **fields: Any,
    ) -> tuple[Report[Any], list[Path]]:
        """Write a report and its plots into `folder` (by default --out-dir); the report and the files that were written.

        fields: further fields of the report; `run` replaces the settings.
        """
        path = (folder or self.path.parent) / self.path.name
        report = REPORTS[self.kind](
            kind=self.kind,
            environment=self.facts,
            command=current_command(),
            results=dict(results),
            checks=list(checks),
            **({"run": self.settings} | fields),
        )
        kept = keep_previous(path, self.kind, report.command)
        older = set(path.parent.glob(f"phase1_{self.kind}_*.png"))
        write_report(report, path)
        for stale in sorted(older - {path.with_name(name) for _, name in plots}):
            print(one_line(f"not of this run: {stale} is of an earlier one; remove it", 1000), file=sys.stderr)
        return report, [
            path,
            *kept,
            *(drawn for plot, name in plots for drawn in self._drawn(plot, report, path.with_name(name))),
        ]

    def _drawn(self, plot: Plot, report: Report[Any], path: Path) -> list[Path]:
        """The file of a plot, or none and a line on stderr if it fails: no measurement is lost for a plot."""
        try:
            return [plot(report, path)]
        except Exception as error:
            what = f"{type(error).__name__}: {reason(error)}"
            print(
                one_line(f"phase1 {self.kind}: warning: no plot {path.name} ({what}); the report is whole", 1000),
                file=sys.stderr,
            )
            return []

    def close(self) -> None:
        """End the run: remove the journal, from which --resume would have gone on."""
        self.journal.close()


def require_writable(folder: Path) -> None:
    """Raise OSError now, and not after hours of work, if nothing can be written into `folder`; leaves none that is new."""
    if not is_first():  # it writes nothing there
        return
    new = absent(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    remove_empty(new)


def require_files(folder: Path, names: Sequence[str]) -> None:
    """Raise ValueError now, and not after hours of work, where a folder has one of these names of files in `folder`."""
    for name in names:
        if (folder / name).is_dir():
            expected = one_line(f"--out-dir must have a file at {folder / name}, or nothing", 2000)
            raise ValueError(f"{expected}; got a folder; move it away, or give another --out-dir")


def require_apart(out_dir: str, flag: str, given: str) -> None:
    """Raise ValueError where the folder to write is the one of `flag`, whose files are read: the two would be mixed."""
    out, other = Path(out_dir), Path(given)
    if out.is_dir() and other.is_dir() and out.samefile(other):
        expected = f"--out-dir must be another folder than {flag}, whose files are no output"
        raise ValueError(one_line(f"{expected}; got {out_dir} for both; give a new folder", 2000))


def keep_previous(path: Path, kind: Kind, command: str) -> list[Path]:
    """Move a report of another command at `path` to the first free name, so that none is lost; its new place, if any."""
    try:
        old = read_report(path, kind)
    except ValueError:  # none, or nothing of ours
        return []
    if old.command == command or not is_first():
        return []
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    places = (path.with_name(f"{path.stem}{PREVIOUS}{number}.json") for number in numbers)
    kept = next(place for place in places if not os.path.lexists(place))
    os.replace(path, kept)
    print(
        one_line(f"replaced: {path}, the report of other flags (kept as {kept.name}); --out-dir keeps runs apart", 1000),
        file=sys.stderr,
    )
    return [kept]
