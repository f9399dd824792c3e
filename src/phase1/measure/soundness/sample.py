"""What every check takes and gives: a model with a batch of texts, and one line of what was expected and what came."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from phase1.measure.workload import SEED, random_batch
from phase1.records.schema import Check
from phase1.trainable import OwnModel, Trainable, defined

LEAK = 1e-3  # of what a changed token does to later losses; rounding does less, a model that looks ahead as much
EXACT_LEAK = 1e-9  # the same in float64, where rounding does a millionth of that
NATS = 5e-3  # relative, of losses that must be equal; FP16 rounds to a fifth of that


class Sample(NamedTuple):
    """A model on its device, with a batch of two random texts."""

    model: Trainable
    ids: Tensor  # (2, T)
    targets: Tensor  # (2, T)
    training: bool = False  # in that mode, with the same random numbers in every forward

    def nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """(B, T) float64 nats, of the model as it is evaluated, or trained."""
        with self.mode():
            return self.model.nll(ids, targets)[0].double()

    @contextmanager
    def mode(self) -> Iterator[None]:
        self.model.train(self.training)
        devices = [self.ids.device] if self.ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.training):
            if self.training:
                torch.manual_seed(SEED)
            yield


def sample_of(model: Trainable, seq_length: int, rows: int = 2) -> Sample:
    device = next(model.parameters()).device
    return Sample(model, *random_batch(model.config.vocab_size, rows, seq_length, device.type))


def in_float64(text: Sample) -> Sample:
    """A deep copy of the model in float64, with the same texts: on the CPU, whose operators all know that type."""
    return text._replace(model=copy.deepcopy(text.model).cpu().double(), ids=text.ids.cpu(), targets=text.targets.cpu())


@torch.no_grad()
def output_type(text: Sample) -> torch.dtype:
    """That of the logits, or of the losses where the model scores itself."""
    model = text.model.eval()
    with torch.autocast(text.ids.device.type, enabled=False):
        itself = getattr(model, "scores_itself", False)
        return (model.nll(text.ids, text.targets)[0] if itself else model(text.ids)).dtype


def runs_on_cpu(text: Sample) -> bool:
    try:
        output_type(Sample(copy.deepcopy(text.model).cpu(), text.ids.cpu(), text.targets.cpu()))
    except Exception:
        return False
    return True


def differs(text: Sample) -> str:
    """Empty if two forwards of the same give the same losses, else by how much they differ: as it runs, or in float64."""
    for limit in (LEAK, EXACT_LEAK):
        try:
            tried = text if limit == LEAK else in_float64(text)
            with torch.autocast(
                tried.ids.device.type, enabled=limit == LEAK and torch.is_autocast_enabled(tried.ids.device.type)
            ):
                first, again = (tried.nll(tried.ids, tried.targets) for _ in range(2))
        except Exception:
            if limit == LEAK:
                raise
            return ""  # which cannot tell more
        change = relative_change(first, again)
        if not change <= limit:
            return f"{change:.2g} of the largest"
    return ""


def relative_change(first: Tensor, other: Tensor) -> float:
    """The largest change, over the largest loss; infinite where one is not finite."""
    change = (first - other).abs().max().item() / max(first.abs().max().item(), 1e-12)
    return change if change == change else math.inf


def equal(name: str, got: Tensor, want: Tensor, expected: str, remedy: str, limit: float = NATS) -> Check:
    relative = (got - want).abs().item() / max(abs(want.item()), 1e-12)
    digits = 4 if limit == NATS else 7
    return judged(name, relative, limit, f"{expected} ({want.item():.{digits}f})", f"{got.item():.{digits}f}", remedy)


def judged(name: str, value: float, limit: float, expected: str, got: str, remedy: str) -> Check:
    """Pass if `value` is at most `limit`, and if not, one line with all three; no value that is not finite."""
    if value <= limit:
        return Check(name=name, value=value, limit=limit, status="pass", detail=expected)
    known = value if math.isfinite(value) else None
    return Check(name=name, value=known, limit=limit, status="fail", detail=f"expected {expected}; got {got}; {remedy}")


def fails(name: str, detail: str) -> Check:
    return Check(name=name, value=None, limit=None, status="fail", detail=detail)


def where(text: Sample, method: str = "") -> str:
    """Where in the user's module that method begins, or what scores: as " (file.py, line 3)"."""
    if not isinstance(text.model, OwnModel):  # a LanguageModel with a mixer of the user's
        return ""
    module = text.model.model
    if text.model.scores_itself:
        return defined(getattr(type(module), method or "nll"))
    return defined(type(module).forward)
