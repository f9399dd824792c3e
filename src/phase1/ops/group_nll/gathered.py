"""The loss inside groups in PyTorch: only for tokens that are in a group, some of them at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of rows gathered at once


def losses(
    states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, order: Tensor, starts: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """nll, (N,), and log Σ exp(z) of each token's group, (N,), both 0 where there is none."""
    wide = torch.promote_types(states.dtype, torch.float32)
    nll, normalizer = (torch.zeros(len(states), dtype=wide, device=states.device) for _ in range(2))
    for tokens, _, z in _scores(states, rows, bias, targets, size):
        normalizer[tokens] = z.logsumexp(1)
        nll[tokens] = normalizer[tokens] - z.gather(1, (targets[tokens] % size)[:, None])[:, 0]
    return nll, normalizer


def gradients(
    states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, order: Tensor, starts: Tensor, normalizer: Tensor,
    d_nll: Tensor, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of states, rows and bias."""
    d_states = torch.zeros_like(states, memory_format=torch.contiguous_format)
    d_rows, d_bias = torch.zeros(rows.shape, dtype=normalizer.dtype, device=rows.device), torch.zeros_like(bias)
    for tokens, members, z in _scores(states, rows, bias, targets, size):
        d_z = (z - normalizer[tokens, None]).exp()
        d_z.scatter_add_(1, (targets[tokens] % size)[:, None], -torch.ones_like(d_z[:, :1]))
        d_states[tokens] = (
            torch.einsum("ns,nsd->nd", d_z.to(states.dtype), rows[members].to(states.dtype)).to(d_z.dtype) * d_nll[tokens, None]
        ).to(states.dtype)
        d_z *= d_nll[tokens, None]
        d_bias.index_put_((members,), d_z, accumulate=True)
        d_rows.index_put_((members,), d_z[:, :, None] * states[tokens, None], accumulate=True)
    return d_states, d_rows.to(rows.dtype), d_bias


def _scores(states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, the rows of their groups, and z, -inf past the last row."""
    for tokens in (targets >= 0).nonzero()[:, 0].split(max(1, CHUNK_BYTES // (rows.element_size() * size * rows.shape[1]))):
        members = (targets[tokens] // size * size)[:, None] + torch.arange(size, device=rows.device)
        real, members = members < len(rows), members.clamp(max=len(rows) - 1)
        z = torch.einsum("nd,nsd->ns", states[tokens], rows[members].to(states.dtype))
        yield tokens, members, (z.to(torch.promote_types(z.dtype, torch.float32)) + bias[members]).where(real, -torch.inf)
