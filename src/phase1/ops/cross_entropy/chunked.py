"""Tied cross-entropy by chunks of tokens, gradients taken on the way: memory does not grow with tokens × vocabulary."""

from typing import Any

import torch
from torch import Tensor

from phase1.ops.cross_entropy.reference import IGNORE, check_arguments

CHUNK_BYTES = 128 * 2**20  # of float32 logits held at once: 667 tokens of 50257


def tied_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Fast form of `tied_cross_entropy_reference`: same arguments, result, gradients and errors."""
    check_arguments(hidden, table, targets)
    return _TiedCrossEntropy.apply(hidden, table, targets)


@torch.no_grad()
def tied_nll(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """The same losses token by token, (N,), zero where the target is IGNORE; for evaluation, without gradients."""
    check_arguments(hidden, table, targets)
    with torch.autocast(hidden.device.type, enabled=False):
        rows, wide = table.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
        parts = zip(hidden.split(_chunk_tokens(table)), targets.split(_chunk_tokens(table)), strict=True)
        return torch.cat([_chunk(h, rows, t, wide, need=False)[0] for h, t in parts])


def _chunk_tokens(table: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * table.shape[0]))


class _TiedCrossEntropy(torch.autograd.Function):
    """The gradients are taken in the forward pass, while a chunk's probabilities exist, for a sum of losses
    (so that half precision sees numbers of order 1), and scaled by the incoming gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            wide = torch.promote_types(hidden.dtype, torch.float32)
            rows = table.to(hidden.dtype)
            need_hidden, need_table = ctx.needs_input_grad[:2]
            d_hidden = torch.empty_like(hidden) if need_hidden else None
            d_table = torch.zeros_like(table, dtype=wide) if need_table else None
            loss = torch.zeros((), dtype=wide, device=hidden.device)
            size = _chunk_tokens(table)
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                chunk_loss, d_logits = _chunk(hidden[part], rows, targets[part], wide, need_hidden or need_table)
                loss += chunk_loss.sum()
                if d_hidden is not None:
                    torch.mm(d_logits, rows, out=d_hidden[part])
                if d_table is not None:
                    d_table += d_logits.T @ hidden[part]
                del d_logits
        scored = (targets != IGNORE).sum()
        ctx.table_dtype = table.dtype
        ctx.save_for_backward(d_hidden, d_table, scored)
        return loss / scored

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_table, scored = ctx.saved_tensors
        scale = d_loss / scored
        d_hidden = None if d_hidden is None else torch.mul(d_hidden, scale, out=torch.empty_like(d_hidden))
        if d_table is not None:  # straight into the table's dtype: a float32 product would be a table more at the peak
            d_table = torch.mul(d_table, scale, out=torch.empty_like(d_table, dtype=ctx.table_dtype))
        return d_hidden, d_table, None


def _chunk(hidden: Tensor, rows: Tensor, targets: Tensor, wide: torch.dtype, need: bool) -> tuple[Tensor, Tensor | None]:
    """The losses of a chunk's tokens, and if needed the gradient of their sum with respect to the logits."""
    scored = targets != IGNORE
    column = targets.where(scored, 0)[:, None]
    logits = (hidden @ rows.T).to(wide)
    log_total = logits.logsumexp(1, keepdim=True)
    loss = (log_total - logits.gather(1, column)).squeeze(1) * scored
    if not need:
        return loss, None
    probability = logits.sub_(log_total).exp_()
    probability.scatter_add_(1, column, torch.full_like(column, -1, dtype=wide))
    return loss, probability.mul_(scored[:, None]).to(hidden.dtype)
