"""All checks of a new model, in order, and those that a trained one passes again before it is scored."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from phase1.config import ModelConfig
from phase1.measure.soundness.causality import (
    causal_at_length,
    causal_gradients,
    causal_if_it_fits,
    causal_in_training,
    causal_outputs,
)
from phase1.measure.soundness.losses import any_length, deterministic, distribution, loss_is_nats, precisions, uniform
from phase1.measure.soundness.module import isolated, learns, moves, runs
from phase1.measure.soundness.sample import Sample, differs, fails, sample_of
from phase1.measure.workload import SEED
from phase1.records.schema import Check
from phase1.trainable import Trainable, WrongOutput, WrongReference, build, pass_on, raised
from phase1.training.optimizers import described_groups

SCORED = 200  # positions of the check before a perplexity: some chunks of any kernel

COMPARING = ("causal", "causal_in_training", "causal_gradients", "loss_is_the_mean", "distribution", "any_length", "precisions",
             "causal_at_length")  # fmt: skip
"""Checks that compare two forwards, by their first name: they tell nothing of a model whose forwards differ by themselves."""


class Unsound(ValueError):
    """A model that may not be scored: its number would mean nothing, and `why` says what is wrong with it."""

    def __init__(self, model: str | None, why: str) -> None:
        super().__init__(f"--model {model} may not be scored: {why}")
        self.why = why


def check_model(config: ModelConfig, seq_length: int, device: str) -> Iterator[Check]:
    """Every check of a new model of `config`, one after the other; a check that raises has failed.

    The first builds the model and the second runs it: where either fails there is nothing to check. Raises ValueError where
    `config` names no model.
    """
    torch.manual_seed(SEED)
    built, text = _guarded("builds", lambda: _built(config, seq_length, device))
    yield from built
    if text is None:
        return
    ran, _ = _guarded("runs", lambda: ([runs(text)], None))
    yield from ran
    if ran[0].status == "fail":
        return
    checks: dict[str, Callable[[Sample], Check | list[Check]]] = {
        "deterministic": deterministic, "every_tensor_moves": moves, "causal": causal_outputs,
        "causal_in_training": causal_in_training, "causal_gradients": causal_gradients, "loss_is_the_mean": loss_is_nats,
        "distribution": distribution, "uniform_is_ln_v": uniform, "any_length": any_length, "precisions": precisions,
        "learns": learns, "isolated": isolated, "causal_at_length": causal_at_length,
    }  # fmt: skip
    repeats, leaks = True, ""
    for name, check in checks.items():
        if not repeats and name in COMPARING:
            yield Check.undecided(name, "it compares two forwards, which differ by themselves: correct deterministic first")
            continue
        if leaks and name == "causal_at_length":
            yield Check.undecided(name, f"correct {leaks} first")
            continue
        found, _ = _guarded(name, lambda check=check: (check(text), None))  # type: ignore[misc]
        yield from found
        if name == "deterministic":
            repeats = found[0].status == "pass" or _guarded(name, lambda: ([], differs(text)))[1] == ""
        leaks = leaks or next((one.name for one in found if one.status == "fail" and one.name.startswith("causal")), "")


def _built(config: ModelConfig, seq_length: int, device: str) -> tuple[Check, Sample]:
    model = build(config).to(device)
    detail = f"{described_groups(model)}; on {device}"
    check = Check(name="builds", value=sum(p.numel() for p in model.parameters()), limit=None, status="pass", detail=detail)
    return check, sample_of(model, seq_length)


def _guarded(name: str, check: Callable[[], tuple[Any, Any]]) -> tuple[list[Check], Any]:
    """What `check` gives, as a list of checks and something more; one that fails, and nothing, where it raises."""
    try:
        found, more = check()
    except BaseException as error:  # a user's code may raise SystemExit
        pass_on(error)
        if isinstance(error, WrongReference):
            raise
        if isinstance(error, WrongOutput) or (name == "builds" and isinstance(error, ValueError)):
            return [fails(name, re.sub(r"^--model \S+ ?", "", str(error)))], None  # has what it expected, and the remedy
        return [fails(name, f"expected {EXPECTED.get(name, 'no error')}; got {raised(error)}; correct that line")], None
    return found if isinstance(found, list) else [found], more


EXPECTED = {
    "builds": "a model",
    "runs": "forward and backward of a batch",
    "any_length": "losses of texts of any length",
    "isolated": "a fresh process to build the model",
}


def require_sound(model: Trainable, seq_length: int, dtype: torch.dtype) -> None:
    """Raise Unsound unless `model`, trained, sees no future and its losses are those of a distribution, in nats."""
    was_training = model.training
    try:
        with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype != torch.float32):
            for why in _faults(model, seq_length):
                raise Unsound(model.config.model, why)
    finally:
        model.train(was_training)


def _faults(model: Trainable, seq_length: int) -> Iterator[str]:
    text = sample_of(model, min(seq_length, SCORED))
    if not torch.isfinite(text.nll(text.ids, text.targets)).all():
        yield "expected finite losses; got others; train with a smaller --learning-rate"
    if difference := differs(text):
        yield f"expected the same losses twice; got {difference}; keep nothing between calls, draw nothing in eval()"
    checks = [causal_outputs(text), *loss_is_nats(text)]
    if seq_length > SCORED:
        checks += causal_if_it_fits(sample_of(model, seq_length, rows=1))
    yield from (check.detail for check in checks if check.status == "fail")
