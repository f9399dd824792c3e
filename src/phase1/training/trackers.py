"""Viewers that get the progress of a training besides metrics.jsonl; none is imported unless it is asked for."""

from importlib import import_module
from pathlib import Path
from typing import Any

from phase1.errors import Unavailable
from phase1.training.watch import Tracker


def tracker(name: str, folder: Path, settings: dict[str, Any]) -> Tracker:
    """The viewer called `name`; Unavailable, one line, where its package is missing."""
    try:
        return TensorBoard(folder, settings) if name == "tensorboard" else Runs(import_module(name), folder, settings)
    except ImportError as error:
        raise Unavailable(f"--report-to {name} needs a package; run `pip install {name}`") from error


class TensorBoard:
    """Event files in `folder`/tensorboard."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in settings.items()))

    def log(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row):
            self._writer.add_scalar(name, value, row["step"])

    def sample(self, step: int, text: str) -> None:
        self._writer.add_text("sample", text, step)

    def close(self) -> None:
        self._writer.close()


class Runs:
    """A run of the project `phase1`, named as `folder` is, in Weights & Biases or in trackio, which has the same functions.

    Where it goes, and by whose account, is as the user has set the package up.
    """

    def __init__(self, package: Any, folder: Path, settings: dict[str, Any]) -> None:
        self._package = package
        own: dict[str, Any] = {}
        if package.__name__ == "wandb":
            own = {"dir": str(folder), "mode": "offline" if settings["offline"] else None}
        package.init(project="phase1", name=folder.name, config=settings, **own)

    def log(self, row: dict[str, Any]) -> None:
        self._package.log(dict(_numbers(row)), step=row["step"])

    def sample(self, step: int, text: str) -> None:
        self._package.log({"sample": text}, step=step)

    def close(self) -> None:
        self._package.finish()


def _numbers(row: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in row.items() if value is not None and name != "step"]
