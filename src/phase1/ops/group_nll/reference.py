"""The definition of the loss inside groups, with the rows of every token's group in memory."""

import torch
from torch import Tensor


def check_arguments(states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, size: int) -> None:
    """Raise ValueError unless the shapes are those of `group_nll_reference`."""
    if states.ndim != 2 or rows.ndim != 2 or states.shape[1] != rows.shape[1]:
        raise ValueError(f"states (N, D) and rows (n, D) expected; got {tuple(states.shape)} and {tuple(rows.shape)}")
    if bias.shape != rows.shape[:1] or targets.shape != states.shape[:1] or size < 1 or not len(rows):
        raise ValueError(
            f"bias (n,) = ({len(rows)},), targets (N,) = ({len(states)},), n ≥ 1 and size ≥ 1 expected; "
            f"got {tuple(bias.shape)}, {tuple(targets.shape)}, {len(rows)} and {size}"
        )


def group_nll_reference(states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, size: int) -> Tensor:
    """nll_i = log Σ_j exp(z_ij) - z_i,t_i (nats), z_ij = h_i · E_j + b_j, over the j of the group of t_i: j // s = t_i // s.

    Args:
        states: h, (N, D).
        rows: E, (n, D), taken in the dtype of the states; s after another are a group, the last may have less.
        bias: b, (n,), at least float32.
        targets: t, (N,) integers below n; a negative one is in no group.
        size: s.
    Returns:
        (N,), at least float32; 0, without a gradient, where the target is in no group.
    Raises:
        ValueError: the shapes do not fit together.
    """
    check_arguments(states, rows, bias, targets, size)
    inside = targets >= 0
    target = targets.clamp(min=0)
    members = (target // size * size)[:, None] + torch.arange(size, device=rows.device)
    real, members = members < len(rows), members.clamp(max=len(rows) - 1)
    z = torch.einsum("nd,nsd->ns", states, rows.to(states.dtype)[members])
    z = (z.to(torch.promote_types(z.dtype, torch.float32)) + bias[members]).where(real, -torch.inf)
    nll = z.logsumexp(1) - z.gather(1, (target % size)[:, None])[:, 0]
    return nll.where(inside, 0)
