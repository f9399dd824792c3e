"""Muon: steps of matrices along their orthogonalised momentum, all matrices of one shape together."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from phase1.parallel.parts import own, part_of, whole

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose slope at 0 is steepest
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Step every matrix W (n, m) with gradient G by

        M = 0.95 M + 0.05 G,   W = (1 - lr decay) W - lr 0.2 sqrt(max(n, m)) orthogonal(0.05 G + 0.95 M)

    The factor gives updates the size that AdamW's have, so that one rate and one decay serve both. What
    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` computes; that one takes matrices one by one, in some 30 launches each.

    Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; Liu et al. 2025, "Muon is scalable for LLM training",
    section 2.2.
    """

    found_inf: Tensor | None = None
    """() of a loss scaler, not 0 where a gradient is not finite: then a step changes nothing. The host need not know it."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.1, dtype: torch.dtype | None = None) -> None:
        """dtype: of the products that orthogonalise, bfloat16 on a GPU; None: that of the parameters."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            of_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape[parameter.shape].append(parameter)
            for shape, parameters in of_shape.items():
                rate, decay = group["lr"] * 0.2 * max(shape) ** 0.5, group["lr"] * group["weight_decay"]
                updates = self._updates(parameters)
                kept = 1 - decay if self.found_inf is None else torch.where(own(self.found_inf) == 0, 1 - decay, 1.0)
                parts = [own(parameter) for parameter in parameters]
                torch._foreach_mul_(parts, kept)
                torch._foreach_add_(parts, updates, alpha=-rate)

    def _updates(self, parameters: list[Tensor]) -> list[Tensor]:
        """The orthogonalised momentum of each, this rank's part of it, after the momentum has taken the gradient.

        In place, for these are the largest tensors of a step: two stacks at a time.
        """
        momenta = [self._momentum(parameter) for parameter in parameters]

        def parts(of: Tensor) -> list[Tensor]:
            return [own(part_of(part, like)) for part, like in zip(of, momenta, strict=True)]

        # of shards, every rank computes with the whole
        updates = torch.stack([whole(parameter.grad) for parameter in parameters if parameter.grad is not None])
        momentum = torch.stack([whole(momentum) for momentum in momenta])
        share: Tensor | float = 1 - MOMENTUM
        overflow = None if self.found_inf is None else own(self.found_inf) != 0
        if overflow is not None:
            updates.masked_fill_(overflow, 0.0)
            share = torch.where(overflow, 0.0, share).to(updates.dtype)
        momentum.lerp_(updates, share)
        torch._foreach_copy_([own(momentum) for momentum in momenta], parts(momentum))
        updates.lerp_(momentum, MOMENTUM)  # Nesterov's
        del momentum
        updates = orthogonal(updates.to(self.dtype or updates.dtype)).to(updates.dtype)
        return parts(updates if overflow is None else updates.masked_fill_(overflow, 0.0))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (k, n, m) with their singular values moved to about 1 by five steps of Newton-Schulz.

    X = X / ‖X‖, then five times X = (a + b X Xᵀ + c (X Xᵀ)²) X, on the shorter side.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if tall else x
