"""Tied cross-entropy by chunks of tokens, gradients taken on the way: memory does not grow with tokens × vocabulary."""

from typing import Any

import torch
from torch import Tensor

from phase1.ops.cross_entropy.reference import IGNORE, check_arguments

CHUNK_BYTES = 128 * 2**20  # of float32 logits held at once: 667 tokens of 50257
ALIGNMENT = 8  # rows of logits begin at multiples of it: tensor cores are several times slower on rows of odd length


def tied_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fast form of `tied_cross_entropy_reference`: same arguments, result, gradients and errors."""
    check_arguments(hidden, table, targets, bias)
    return _TiedCrossEntropy.apply(hidden, table, targets, bias)


@torch.no_grad()
def tied_nll(hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same losses token by token, (N,), zero where the target is IGNORE; for evaluation, without gradients."""
    check_arguments(hidden, table, targets, bias)
    scored, column = _columns(targets)
    with torch.autocast(hidden.device.type, enabled=False):
        rows, size = table.to(hidden.dtype), _chunk_tokens(table)
        parts, logits = zip(hidden[scored].split(size), column[scored].split(size), strict=True), _aligned(hidden, rows, size)
        picked = [_exponentials(h, rows, bias, c, logits[: len(h)])[2] for h, c in parts]
    losses = -torch.cat(picked) if picked else hidden.new_zeros(0)
    return losses.new_zeros(len(scored)).masked_scatter(scored, losses)


class _TiedCrossEntropy(torch.autograd.Function):
    """The gradients are taken in the forward pass, while a chunk's probabilities exist, for a sum of losses
    (so that half precision sees numbers of order 1), and scaled by the incoming gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        need_hidden, need_table, _, need_bias = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scored, column = _columns(targets)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, size = table.to(hidden.dtype), _chunk_tokens(table)
            d_hidden = torch.empty_like(hidden) if need_hidden else None
            d_table = torch.zeros_like(table, dtype=wide) if need_table else None
            d_bias = None if bias is None or not need_bias else torch.zeros_like(bias, dtype=wide)
            picked = torch.empty_like(column, dtype=wide)
            logits = _aligned(hidden, rows, size)
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                d_logits = logits[: len(hidden[part])]  # the same memory: logits are no longer needed when it is written
                powers, total, picked[part] = _exponentials(hidden[part], rows, bias, column[part], d_logits)
                powers.scatter_add_(1, column[part], -total)  # times 1 / total: softmax - one-hot
                torch.mul(powers, scored[part, None] / total, out=d_logits)
                del powers
                if d_bias is not None:
                    d_bias += d_logits.sum(0, dtype=wide)
                if d_hidden is not None:
                    torch.mm(d_logits, rows, out=d_hidden[part])
                if d_table is not None:
                    d_table += d_logits.T @ hidden[part]
            del logits
        ctx.table_dtype = table.dtype
        count = scored.sum()
        ctx.save_for_backward(d_hidden, d_table, d_bias, count)
        return -(picked.squeeze(1) * scored).sum() / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        d_hidden, d_table, d_bias, count = ctx.saved_tensors
        scale = d_loss / count
        d_hidden = None if d_hidden is None else torch.mul(d_hidden, scale, out=torch.empty_like(d_hidden))
        if d_table is not None:  # straight into the table's dtype: a float32 product would be a table more at the peak
            d_table = torch.mul(d_table, scale, out=torch.empty_like(d_table, dtype=ctx.table_dtype))
        return d_hidden, d_table, None, None if d_bias is None else d_bias * scale


def _chunk_tokens(table: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * table.shape[0]))


def _columns(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are scored, (N,), and the column of each one's target, (N, 1): 0 where it is not scored."""
    scored = targets != IGNORE
    return scored, targets.where(scored, 0)[:, None]


def _aligned(hidden: Tensor, rows: Tensor, size: int) -> Tensor:
    """Room for the logits of `size` tokens, (size, V), in the dtype of `hidden`."""
    V = rows.shape[0]
    return hidden.new_empty(min(size, hidden.shape[0]), V + -V % ALIGNMENT)[:, :V]


def _exponentials(
    hidden: Tensor, rows: Tensor, bias: Tensor | None, column: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z - max z) of every token, (n, V), their sums, (n, 1), and the log-probability of each `column`, (n, 1).

    All at least float32, in one piece of memory of n × V beside `logits` (n, V), which is overwritten on the way.
    """
    torch.mm(hidden, rows.T, out=logits)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = logits.to(wide, copy=True) if bias is None else logits + bias  # to the bias's float32 in the same pass
    z -= z.amax(1, keepdim=True)
    picked = z.gather(1, column)
    total = z.exp_().sum(1, keepdim=True)
    return z, total, picked - total.log()
