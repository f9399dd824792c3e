"""Proof that a compiled loss has the gradients of the model as it is written: a compiler may be wrong without a word."""

import warnings
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from phase1.errors import Unavailable
from phase1.training.step import Batch, TrainState, make_micro_batch

LIMIT = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Relative error of a parameter's gradient that is rounding; a wrong product is near 1."""
ROUNDING = 2.0  # times as far from float32's as the furthest written gradient is: what sums in another order may come to
FLOOR = 1e-3  # of the norm of all gradients: those of smaller ones are mostly rounding
AWAY = 0.02  # from zero, of parameters that begin there
SCALE = 1024.0  # of the loss, so that no gradient overflows or vanishes in half precision
Gradients = dict[str, Tensor]
"""Of every parameter, by name."""


def prove_compiled(state: TrainState, micro_batch: Batch) -> None:
    """Compare the gradients of a micro batch by the compiled loss with those of the model as it is written.

    For every parameter ‖compiled - written‖ / max(‖written‖, 0.001 ‖all written‖) must be within LIMIT. If one is not, as where
    a gradient in half precision is little more than rounding, the judge is float32: no compiled gradient may be further from
    its than LIMIT, or than ROUNDING times the distance of the furthest written one (which one that is, is chance); without
    memory for it none may differ. Parameters that begin at zero, behind which no gradient passes, are not zero meanwhile;
    afterwards all are what they were, without gradients. A model that needs more memory as it is written than there is stays
    unproven, and one line says so.
    Raises Unavailable, one line, with the parameter that differs most.
    """
    zeros = [parameter for parameter in state.model.parameters() if not parameter.any()]
    generator = torch.Generator().manual_seed(0)
    for parameter in zeros:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * AWAY)
    try:
        found = _gradients(state, micro_batch, state.dtype)
        with torch.compiler.set_stance("force_eager"):
            written = _gradients(state, micro_batch, state.dtype)
            wrong = {name: error for name, error in errors(found, written).items() if not error <= LIMIT[state.dtype]}
            if wrong and state.dtype != torch.float32:
                with suppress(torch.cuda.OutOfMemoryError):  # no room for the judge: what differs is wrong
                    wrong = _further(found, written, _gradients(state, micro_batch, torch.float32), LIMIT[state.dtype])
    except torch.cuda.OutOfMemoryError:
        warnings.warn("the compiled model is not proven: as it is written it needs more memory than there is", stacklevel=2)
        return
    finally:
        for parameter in zeros:
            parameter.data.zero_()
        state.model.zero_grad(set_to_none=True)
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(state.device)
    if wrong:
        name = max(wrong, key=lambda name: wrong[name])
        raise Unavailable(
            f"--compile must give the gradients of the model as it is written; with PyTorch {torch.__version__} that of {name} "
            f"differs by {wrong[name]:.0%}; leave --compile out, or take another PyTorch"
        )


def errors(found: Gradients, wanted: Gradients) -> dict[str, float]:
    """The relative error of every gradient; infinite where one is no number."""
    floor = FLOOR * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    of = {name: ((found[name] - gradient).norm() / gradient.norm().maximum(floor)).item() for name, gradient in wanted.items()}
    return {name: error if error == error else float("inf") for name, error in of.items()}


def _further(found: Gradients, written: Gradients, exact: Gradients, limit: float) -> dict[str, float]:
    """Errors of those found gradients that rounding does not explain."""
    allowed = max(limit, ROUNDING * max(errors(written, exact).values()))
    return {name: e for name, e in errors(found, exact).items() if not e <= allowed}


def _gradients(state: TrainState, micro_batch: Batch, dtype: torch.dtype) -> Gradients:
    """Of every parameter, launched one by one, in autocast to `dtype`."""
    state.model.train()
    state.model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler(state.device.type, init_scale=SCALE, enabled=state.scaler.is_enabled())
    passes = make_micro_batch(state.model, scaler, dtype, replace(state.config, cuda_graphs=False))
    inputs, targets = (part.to(state.device) for part in micro_batch)
    one = torch.ones((), device=state.device)
    passes.backward(passes.forward(inputs, targets, one, one)[0])
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in state.model.named_parameters()}
