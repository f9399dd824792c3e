"""Proof that a compiled loss has the gradients of the model as it is written: a compiler may be wrong without a word."""

from dataclasses import replace

import torch
from torch import Tensor

from phase1.errors import Unavailable
from phase1.training.step import Batch, TrainState, make_micro_batch

LIMIT = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Relative error of a parameter's gradient: rounding takes up to a fifth of it on an H200, a wrong product is near 1."""
FLOOR = 1e-3  # of the norm of all gradients: those of smaller ones are mostly rounding
SCALE = 1024.0  # of the loss, so that no gradient overflows or vanishes in half precision


def prove_compiled(state: TrainState, batch: Batch) -> None:
    """Compare the gradients of the first micro batch of `batch` by the compiled loss with those of the model as it is written.

    For every parameter ‖compiled - written‖ / max(‖written‖, 0.001 ‖all written‖) must be within LIMIT. Afterwards parameters
    are what they were and have no gradients. A model that needs more memory as it is written than there is stays unproven.
    Raises Unavailable, one line, with the parameter that differs most.
    """
    try:
        found = _gradients(state, batch)
        with torch.compiler.set_stance("force_eager"):
            wanted = _gradients(state, batch)
    except torch.cuda.OutOfMemoryError:
        return
    finally:
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


def _gradients(state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """Of every parameter, of the first micro batch, launched one by one."""
    state.model.train()
    state.model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler(state.device.type, init_scale=SCALE, enabled=state.scaler.is_enabled())
    passes = make_micro_batch(state.model, scaler, state.dtype, replace(state.config, cuda_graphs=False))
    inputs, targets = (part[: state.config.micro_batch_size].to(state.device) for part in batch)
    one = torch.ones((), device=state.device)
    passes.backward(passes.forward(inputs, targets, one, one)[0])
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in state.model.named_parameters()}
