"""Trainings as `phase1 train` leaves them: their courses, samples and settings, and the tables of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase1.records.metrics import FIELDS, METRICS, ended_by_patience, read_metrics
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


def trainings_in(folder: Path) -> list[Training]:
    """Those of a folder: its own, those of its subfolders, those of a pipeline.

    Raises ValueError for a foreign file in the place of metrics.jsonl.
    """
    files = [file for place in PLACES for file in sorted(folder.glob(f"{place}/{METRICS}".lstrip("/")))]
    return [_training(file) for file in files]


def _training(file: Path) -> Training:
    samples, settings = (_text(file.with_name(name)) for name in (SAMPLES, SETTINGS))
    return Training(file.resolve().parent.name, read_metrics(file), samples[-SHOWN:], settings, ended_by_patience(file.parent))


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
    valid = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    peak = last["peak_allocated_bytes"]
    return (
        training.name, last["step"], last["tokens"], last["seconds"], last["loss"],
        valid[-1] if valid else None, min(valid, default=None), last["tokens_per_second"], None if peak is None else peak / 1e9,
    )  # fmt: skip
