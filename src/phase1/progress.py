"""Progress of long work on standard error: a bar on a terminal, and elsewhere (a log, CI, SLURM) a line now and then."""

import sys
from threading import RLock
from typing import Any, Final, TextIO

from tqdm import tqdm

LINE_SECONDS: Final = 30.0  # between lines where standard error is no terminal; shorter work prints none
LINE: Final = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
OPEN_LINE: Final = "{desc}: {n_fmt} {unit} [{elapsed}, {rate_fmt}{postfix}]"  # of work whose total is not known


class _Lines:
    """A file for tqdm that ends each of its updates with a newline, in place of going back to the start of the line."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if shown := text.strip("\r\n "):
            self.file.write(shown.encode("ascii", "backslashreplace").decode() + "\n")

    def flush(self) -> None:
        self.file.flush()


class Bar(tqdm):
    """A bar that a fork which is killed cannot stop."""

    _lock = RLock()  # of this process: tqdm's own is shared with all forks of it, and one that is killed may keep it for good


class _Log(Bar):
    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)  # shown by the next line


def progress(iterable: Any = None, *, desc: str, total: float | None = None, unit: str = "it", **options: Any) -> Any:
    """A tqdm bar over `iterable`, or to `update` by hand, on standard error; `options` are tqdm's."""
    if options.get("disable") or sys.stderr.isatty():
        return Bar(iterable, desc=desc, total=total, unit=unit, **options)
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    lines: dict[str, Any] = {"file": _Lines(sys.stderr), "bar_format": OPEN_LINE if total is None else LINE, "miniters": 1}
    return _Log(iterable, desc=desc, total=total, unit=unit, **(options | lines), mininterval=LINE_SECONDS, delay=LINE_SECONDS)
