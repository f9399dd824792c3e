"""`phase1 curves`: the courses of several trainings in one plot."""

from pathlib import Path

from phase1.plots import plot_training
from phase1.records.collect import Damage
from phase1.records.metrics import METRICS
from phase1.runs import CurvesRun
from phase1.tables.screen import Screen, text
from phase1.tables.training import Training, trainings_in
from phase1.text import one_line, without_private


def main(run: CurvesRun) -> int:
    """Draw the trainings of all folders; ValueError for a folder that has none.

    A damaged file is named and left out, and the exit status is 2.
    """
    damage = Damage("curves")
    trainings = {name: made for folder in run.folders for name, made in named(folder, damage).items()}
    if damage.found and not trainings:
        return damage.status
    out = plot_training({name: made.rows for name, made in trainings.items()}, Path(run.out))
    print(text(screen(trainings, out)))
    return damage.status


def named(folder: str, damage: Damage) -> dict[str, Training]:
    """The trainings of a folder, by what tells them from those of other folders."""
    before = damage.found
    found = [made for made in trainings_in(Path(folder), damage) if made.rows]
    if not found and damage.found == before:
        raise ValueError(f"{one_line(folder)}: expected a folder of phase1 train; got no {METRICS}; give its --out-dir")
    place = without_private(folder).rstrip("/")
    return {place if len(found) == 1 else f"{place}/{made.name}": made for made in found}


def screen(trainings: dict[str, Training], out: Path) -> Screen:
    """Where each has come to."""
    width = max(map(len, trainings))
    return Screen(
        question="Trainings over their tokens: which loss falls faster?",
        numbers=[f"{name:<{width}}  {_end(made)}" for name, made in trainings.items()],
        answer=f"{len(trainings)} in one plot; losses of one tokenizer and one valid text can be compared",
        files=[out],
    )


def _end(made: Training) -> str:
    valid = [row["val_loss"] for row in made.rows if row["val_loss"] is not None]
    said = f"{made.rows[-1]['tokens']:,} tokens"
    return f"{said}, valid loss {valid[-1]:.3f}, best {min(valid):.3f}" if valid else said
