"""Trainings as `phase1 train` leaves them: their courses, samples and settings, and the tables of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase1.records.collect import refused
from phase1.records.metrics import FIELDS, METRICS, ended_by_patience, read_course, require_undamaged, rows_of_last_text
from phase1.tables.table import Column, Table

SAMPLES, SETTINGS = "samples.txt", "run.toml"
SHOWN = 4000  # characters of the last samples
PLACES = ("", "*", "checkpoints/*")


@dataclass(frozen=True)
class Training:
    """One training's `rows` of metrics.jsonl, its last samples and its settings, both may be empty; did --patience end it?"""

    name: str
    rows: list[dict[str, Any]]
    samples: str
    settings: str
    out_of_patience: bool = False


def trainings_in(folder: Path, damaged: Callable[[ValueError], object] = refused) -> list[Training]:
    """Those of a folder: its own, those of its subfolders, those of a pipeline.

    A foreign file in the place of metrics.jsonl, one without a whole step, a damaged line before whole ones and a checkpoint's
    damaged index are a ValueError each, which `damaged` gets: by default it is raised.
    """
    files = [file for place in PLACES for file in sorted(folder.glob(f"{place}/{METRICS}".lstrip("/")))]
    return [training for file in files if (training := _training(file, damaged)) is not None]


def _training(file: Path, damaged: Callable[[ValueError], object]) -> Training | None:
    """None where there is no course; a damaged line takes what stands behind it, a damaged index of a checkpoint nothing."""
    rows, out_of_patience = None, False
    try:
        rows = read_course(file)
        require_undamaged(file, rows)
        out_of_patience = ended_by_patience(file.parent)
    except ValueError as error:
        damaged(error)
    if rows is None:
        return None
    samples, settings = (_text(file.with_name(name)) for name in (SAMPLES, SETTINGS))
    return Training(file.resolve().parent.name, rows, samples[-SHOWN:], settings, out_of_patience)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def training_comparison(trainings: Sequence[Training]) -> Table:
    """Where every training ended, and its best validation loss."""
    columns = (
        Column("Training"),
        Column("Steps"),
        Column("Tokens"),
        Column("Time", "s", 0),
        Column("Loss", "nats", 4),
        Column("Valid loss", "nats", 4),
        Column("Best valid loss", "nats", 4),
        Column("Throughput", "tokens/s", 0),
        Column("Peak allocated", "GB"),
    )
    rows = tuple(_row(training) for training in trainings)
    early = ", ".join(training.name for training in trainings if training.out_of_patience)
    notes = (f"Ended early, by --patience: {early}.",) if early else ()
    return Table("training_comparison", "Trainings", "", columns, rows, notes)


def training_course(trainings: Sequence[Training]) -> Table:
    """Every row of every metrics.jsonl, by the names that it has there."""
    columns = (Column("Training"), *(Column(name, digits=4) for name in FIELDS))
    rows = tuple((training.name, *(row[name] for name in FIELDS)) for training in trainings for row in training.rows)
    return Table("training_course", "Courses of the trainings", "", columns, rows)


def training_tables(trainings: Sequence[Training]) -> list[Table]:
    """Both tables, of trainings that have begun; none where there is none."""
    begun = [training for training in trainings if training.rows]
    return [training_comparison(begun), training_course(begun)] if begun else []


def _row(training: Training) -> tuple[Any, ...]:
    last, rows = training.rows[-1], training.rows
    valid = [row["val_loss"] for row in rows_of_last_text(rows)]
    speed = last["tokens"] / last["seconds"] if last["seconds"] else None  # of all sessions, as the screen of the training says
    peak = last["peak_allocated_bytes"]
    return (
        training.name, last["step"], last["tokens"], last["seconds"], last["loss"],
        valid[-1] if valid else None, min(valid, default=None), speed, None if peak is None else peak / 1e9,
    )  # fmt: skip
