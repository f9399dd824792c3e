"""Proof that a compiled loss has the gradients of the model as it is written: a compiler may be wrong without a word."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from phase1.errors import Unavailable
from phase1.training.step import Batch, TrainState, make_micro_batch

LIMIT = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Relative error of a parameter's gradient: rounding takes up to a fifth of it on an H200, a wrong product is near 1."""
FLOOR = 1e-3  # of the norm of all gradients: those of smaller ones are mostly rounding
AWAY = 0.02  # from zero, of parameters that begin there
SCALE = 1024.0  # of the loss, so that no gradient overflows or vanishes in half precision


def prove_compiled(state: TrainState, micro_batch: Batch) -> None:
    """Compare the gradients of a micro batch by the compiled loss with those of the model as it is written.

    For every parameter ‖compiled - written‖ / max(‖written‖, 0.001 ‖all written‖) must be within LIMIT. Parameters that begin
    at zero, behind which no gradient passes, are not zero meanwhile; afterwards all are what they were, without gradients. A
    model that needs more memory as it is written than there is stays unproven, and one line says so.
    Raises Unavailable, one line, with the parameter that differs most.
    """
    zeros = [parameter for parameter in state.model.parameters() if not parameter.any()]
    generator = torch.Generator().manual_seed(0)
    for parameter in zeros:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * AWAY)
    try:
        found = _gradients(state, micro_batch)
        with torch.compiler.set_stance("force_eager"):
            wanted = _gradients(state, micro_batch)
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
    error, name = worst(found, wanted)
    if not error <= LIMIT[state.dtype]:  # nor if it is no number
        raise Unavailable(
            f"--compile must give the gradients of the model as it is written; with PyTorch {torch.__version__} that of {name} "
            f"differs by {error:.0%}; leave --compile out, or take another PyTorch"
        )


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a gradient, and its parameter's name."""
    floor = FLOOR * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    errors = {name: (found[name] - gradient).norm() / gradient.norm().maximum(floor) for name, gradient in wanted.items()}
    return max((float("inf") if error.isnan() else error.item(), name) for name, error in errors.items())


def _gradients(state: TrainState, micro_batch: Batch) -> dict[str, Tensor]:
    """Of every parameter, launched one by one."""
    state.model.train()
    state.model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler(state.device.type, init_scale=SCALE, enabled=state.scaler.is_enabled())
    passes = make_micro_batch(state.model, scaler, state.dtype, replace(state.config, cuda_graphs=False))
    inputs, targets = (part.to(state.device) for part in micro_batch)
    one = torch.ones((), device=state.device)
    passes.backward(passes.forward(inputs, targets, one, one)[0])
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in state.model.named_parameters()}
