"""The course of a training, metrics.jsonl: one strict JSON object per look at it, none lost or doubled by a resumed run."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, Final

from phase1.files import atomic_write, naming, open_to_append, read_json
from phase1.text import one_line

METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.json"  # beside it: the index of a checkpoint, of phase1.training.checkpoint
MAX_CHECKPOINT_BYTES: Final = 2**20
PATIENCE = "patience"  # why a training has ended, in the facts of its checkpoint
FIELDS = (
    "step", "tokens", "seconds", "loss", "val_loss", "lr", "grad_norm", "loss_scale", "tokens_per_second",
    "peak_allocated_bytes", "session", "unigram_loss",
)  # fmt: skip
"""Fields of every object; null if unknown. `loss` and `grad_norm` are means since the last object, `seconds` the training time
of all sessions, `unigram_loss` is what ignoring all context reaches on the text of `val_loss`."""
YOUNGER = {"session": 1, "unigram_loss": None}  # fields that files of earlier versions lack


class MetricsLog:
    """Appends to the file at `path`, after removing an incomplete last line and all objects after `step`.

    `rows` are those that were there, `session` is the number of the one that begins, from 1.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        self.session = 1 + (self.rows[-1]["session"] if self.rows else 0)
        content = "".join(_line(row) for row in self.rows).encode()
        if not path.exists() or path.read_bytes() != content:
            atomic_write(path, content)
        self._file = open_to_append(path)

    def append(self, row: dict[str, Any]) -> None:
        with naming(self.path):
            self._file.write(_line(row).encode())
            self._file.flush()

    def keep(self) -> None:
        """Make the written objects survive a power cut; called with every checkpoint."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row that could not be written, which `append` has said
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of the file by rising step, without an incomplete or damaged end; none where the first line is torn.

    Raises ValueError where the file cannot be read or its first line is not of such a file.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{one_line(path)}: expected a file that `phase1 train` wrote; got {error.strerror}") from error
    rows: list[dict[str, Any]] = []
    for line in lines[:-1]:  # a whole line ends with a newline
        row = _row(line)
        if row is None or (rows and row["step"] <= rows[-1]["step"]):
            break
        rows.append(row)
    if not rows and (first := next(filter(None, lines), b"")) and not _is_torn(first):
        raise ValueError(f"{one_line(path)}: expected a file that `phase1 train` wrote; got another; name another folder")
    return rows


def read_course(path: Path) -> list[dict[str, Any]]:
    """`read_metrics` for a reader who wants steps: ValueError, too, where the file has begun and holds no whole one."""
    rows = read_metrics(path)
    if not rows and path.stat().st_size:
        raise ValueError(f"{one_line(path)}: expected steps of a training; got no whole step yet; run the train command again")
    return rows


def rows_of_text(rows: list[dict[str, Any]], unigram_loss: float | None) -> list[dict[str, Any]]:
    """The rows whose `val_loss` is of the text whose frequencies alone reach `unigram_loss`; of a text not known, all."""
    scored = [row for row in rows if row["val_loss"] is not None]
    return [row for row in scored if None in (unigram_loss, row["unigram_loss"]) or row["unigram_loss"] == unigram_loss]


def rows_of_last_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose `val_loss` can be compared with the last one: a session may have looked at another text, or at more of it."""
    return rows_of_text(rows, next((row["unigram_loss"] for row in reversed(rows) if row["val_loss"] is not None), None))


def require_undamaged(path: Path, rows: list[dict[str, Any]]) -> None:
    """Raise ValueError where whole objects stand behind a damaged line, at which `rows`, those that were read, end."""
    lines = path.read_bytes().split(b"\n")[len(rows) : -1]
    if behind := sum(_row(line) is not None for line in lines[1:]):
        wrong = f"{one_line(path)}, line {len(rows) + 1}: expected the object of a later step; got another"
        raise ValueError(f"{wrong}; whole lines after it are left out ({behind:,}); restore or remove that line")


def ended_by_patience(folder: Path) -> bool:
    """Whether the checkpoint in `folder`, if there is one, is of a training that --patience ended; ValueError for damage."""
    path = folder / CHECKPOINT
    if not path.exists():
        return False
    try:
        index = read_json(path, MAX_CHECKPOINT_BYTES)
        if not isinstance(index, dict) or not isinstance(index.get("facts"), dict):
            raise ValueError("the file of another program")
    except ValueError as error:
        expected = f"{one_line(path)}: expected the index of a checkpoint"
        raise ValueError(f"{expected}; got {one_line(error)}; move it away, or train in another folder") from error
    return bool(index["facts"].get("ended_by") == PATIENCE)


def _is_torn(line: bytes) -> bool:
    """Whether a killed writer may have left `line`, the first of a file: the beginning of an object, or all but its newline."""
    begin = b'{"step": '
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(begin) or begin.startswith(line)
    return _row(line) is not None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    row = YOUNGER | row if isinstance(row, dict) else {}
    if row.keys() != set(FIELDS) or type(row["step"]) is not int or type(row["session"]) is not int:
        return None
    return row if all(value is None or _is_number(value) for value in row.values()) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _line(row: dict[str, Any]) -> str:
    """NaN and infinity, as of a diverged loss, become null."""
    assert row.keys() == set(FIELDS)
    finite = {name: row[name] if row[name] is None or math.isfinite(row[name]) else None for name in FIELDS}
    return json.dumps(finite, allow_nan=False) + "\n"
