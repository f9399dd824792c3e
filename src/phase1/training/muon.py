"""Muon: steps of matrices along their orthogonalised momentum, all matrices together."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from phase1.parallel.parts import own, part_of, whole

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose slope at 0 is steepest
ITERATIONS = (3, 2)  # after three in half precision, rounding has begun to be eigenvalues that are not there


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
        """dtype: of the products that orthogonalise, float16 on a GPU; None: that of the parameters."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        overflow = None if self.found_inf is None else own(self.found_inf) != 0
        for group in self.param_groups:
            of_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape[parameter.shape].append(parameter)
            kept: Tensor | float = 1 - group["lr"] * group["weight_decay"]
            kept = kept if overflow is None else torch.where(overflow, 1.0, kept)
            updates = [self._ahead(parameters, overflow) for parameters in of_shape.values()]
            orthogonalise(updates)
            for shape, parameters in reversed(of_shape.items()):
                update = updates.pop().to(parameters[0].dtype)
                update = update if overflow is None else update.masked_fill_(overflow, 0.0)
                mine = [own(parameter) for parameter in parameters]
                torch._foreach_mul_(mine, kept)
                torch._foreach_add_(mine, _parts(update, parameters), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _ahead(self, parameters: list[Tensor], overflow: Tensor | None) -> Tensor:
        """0.05 G + 0.95 M of matrices of one shape over its norm, (k, n, m) in the type of the products, after M has taken G.

        In place, for these are the largest tensors of a step. Of shards, every rank computes with the whole.
        """
        momenta = [self._momentum(parameter) for parameter in parameters]
        ahead = torch.stack([whole(parameter.grad) for parameter in parameters if parameter.grad is not None])
        momentum = torch.stack([whole(momentum) for momentum in momenta])
        share: Tensor | float = 1 - MOMENTUM
        if overflow is not None:
            ahead.masked_fill_(overflow, 0.0)
            share = torch.where(overflow, 0.0, share).to(ahead.dtype)
        momentum.lerp_(ahead, share)
        torch._foreach_copy_([own(momentum) for momentum in momenta], _parts(momentum, momenta))
        ahead.lerp_(momentum, MOMENTUM)  # Nesterov's
        del momentum
        ahead /= torch.linalg.vector_norm(ahead, dim=(1, 2), keepdim=True).clamp(min=1e-7)
        return ahead.to(self.dtype or ahead.dtype)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _parts(stack: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each matrix of a stack, which is spread as its parameter is."""
    return [own(part_of(matrix, other)) for matrix, other in zip(stack, like, strict=True)]


def orthogonalise(stacks: list[Tensor]) -> None:
    """Replace matrices of norm 1, or 0, by those with singular values moved to about 1: five steps of Newton-Schulz.

    Five times X = P X with P = a + b A + c A², A = X Xᵀ, on the shorter side. Since A becomes P A P, the products P … P are
    taken of A alone, which is smaller than X, for all shapes with that side at once; X Xᵀ is taken anew after three.

    Args:
        stacks: (k, n, m) each, of any sizes.

    Source: Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz", https://dao-lab.ai/blog/2026/gram-newton-schulz
    """
    of_side: defaultdict[int, list[int]] = defaultdict(list)
    for number, stack in enumerate(stacks):
        of_side[min(stack.shape[1:])].append(number)
    for numbers in of_side.values():
        for count in ITERATIONS:
            factors = _factors([_wide(stacks[number]) for number in numbers], count)
            for number, factor in zip(numbers, factors, strict=True):
                x = _wide(stacks[number])
                stacks[number] = factor @ x if x is stacks[number] else (factor @ x).mT


def _wide(stack: Tensor) -> Tensor:
    return stack.mT if stack.shape[1] > stack.shape[2] else stack


def _factors(stacks: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """The product of `count` factors P for each stack, (k, s, s)."""
    ends = list(accumulate(map(len, stacks)))
    gram = stacks[0].new_empty(ends[-1], *2 * stacks[0].shape[1:2])
    for x, end in zip(stacks, ends):
        torch.bmm(x, x.mT, out=gram[end - len(x) : end])
    a, b, c = COEFFICIENTS
    product = gram  # until there is one
    for step in range(count):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product if step else factor
        if step < count - 1:
            gram = factor @ gram
            gram = gram @ factor
    return product.split([len(x) for x in stacks])
