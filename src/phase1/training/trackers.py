"""Viewers that get the progress of a training besides metrics.jsonl; none is imported unless it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phase1.errors import Unavailable
from phase1.training.watch import Tracker


def tracker(name: str, folder: Path, settings: dict[str, Any]) -> Tracker:
    """The viewer called `name`; Unavailable, one line, where its package is missing."""
    kinds: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio}
    return kinds[name](folder, settings)


class TensorBoard:
    """Event files in `folder`/tensorboard."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise Unavailable("--report-to tensorboard needs a package; run `pip install tensorboard`") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in settings.items()))

    def log(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row):
            self._writer.add_scalar(name, value, row["step"])

    def sample(self, step: int, text: str) -> None:
        self._writer.add_text("sample", text, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A local trackio project `phase1`, a run per folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import trackio
        except ImportError as error:
            raise Unavailable("--report-to trackio needs a package; run `pip install trackio`") from error
        self._trackio: Any = trackio
        trackio.init(project="phase1", name=folder.name, config=settings)

    def log(self, row: dict[str, Any]) -> None:
        self._trackio.log(dict(_numbers(row)), step=row["step"])

    def sample(self, step: int, text: str) -> None:
        self._trackio.log({"sample": text}, step=step)

    def close(self) -> None:
        self._trackio.finish()


def _numbers(row: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in row.items() if value is not None and name != "step"]
