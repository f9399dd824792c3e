"""Tied cross-entropy by chunks of tokens, gradients taken on the way: memory does not grow with tokens × vocabulary."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.cross_entropy.reference import ALIGNMENT, IGNORE, check_arguments
from phase1.ops.cross_entropy.rows import softmax_rows

CHUNK_BYTES = 128 * 2**20  # of logits held at once: 1335 tokens of 50257 in half precision


def tied_cross_entropy(
    hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None, log_odds: Tensor | None = None
) -> Tensor:
    """Fast form of `tied_cross_entropy_reference`: same arguments, result, gradients and errors."""
    check_arguments(hidden, table, targets, bias, log_odds)
    return _TiedCrossEntropy.apply(hidden, table, targets, bias, log_odds)


@torch.no_grad()
def tied_nll(hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same losses token by token, (N,), zero where the target is IGNORE; for evaluation, without gradients."""
    check_arguments(hidden, table, targets, bias)
    scored, column = _columns(targets)
    hidden, column = hidden[scored], column[scored]
    with torch.autocast(hidden.device.type, enabled=False):
        rows, logits = table.to(hidden.dtype), _room(hidden, table)
        picked = torch.empty_like(column, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part in _parts(hidden, logits):
            z = _logits(hidden[part], rows, logits)
            softmax_rows(z, bias, column[part], picked[part], None)
    return picked.new_zeros(len(scored)).masked_scatter(scored, -picked)


class _TiedCrossEntropy(torch.autograd.Function):
    """The gradients are taken in the forward pass, while a chunk's probabilities exist, for a sum of losses
    (so that half precision sees numbers of order 1), and scaled by the incoming gradient in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None
    ) -> Tensor:
        need_hidden, need_table, _, need_bias, _ = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scored, column = _columns(targets)
        log_odds = None if log_odds is None else log_odds.to(wide).contiguous()
        with torch.autocast(hidden.device.type, enabled=False):
            rows = table.to(hidden.dtype)
            d_hidden = torch.zeros_like(hidden) if need_hidden else None
            d_table = torch.zeros_like(table, dtype=wide) if need_table else None
            d_bias = None if bias is None or not need_bias else torch.zeros_like(bias, dtype=wide)
            picked = torch.empty_like(column, dtype=wide)
            logits = _room(hidden, table)
            for part in _parts(hidden, logits):
                d_logits = _logits(hidden[part], rows, logits)  # the same memory: logits are not needed when it is written
                odds = None if log_odds is None else log_odds[part]
                softmax_rows(d_logits, bias, column[part], picked[part], scored[part], odds)
                factors = hidden[part] if d_bias is None else _with_ones(hidden[part])
                for block in _blocks(rows):
                    if d_hidden is not None:
                        d_hidden[part] += d_logits[:, block] @ rows[block]
                    if d_table is None and d_bias is None:
                        continue
                    sums = d_logits[:, block].T @ factors
                    if d_table is not None:
                        d_table[block] += sums[:, : table.shape[1]]
                    if d_bias is not None:
                        d_bias[block] += sums[:, -1]
                    del sums  # before the next, which is as large
            del logits
        ctx.table_dtype = table.dtype
        count = scored.sum()
        d_odds = None if log_odds is None else -(log_odds - picked).sigmoid() * scored
        ctx.save_for_backward(d_hidden, d_table, d_bias, d_odds, count)
        if log_odds is not None:
            picked = picked + F.softplus(log_odds - picked)
        return -(picked * scored).sum() / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_table, d_bias, d_odds, count = ctx.saved_tensors
        scale = d_loss / count
        d_hidden = None if d_hidden is None else torch.mul(d_hidden, scale, out=torch.empty_like(d_hidden))
        if d_table is not None:  # straight into the table's dtype: a float32 product would be a table more at the peak
            d_table = torch.mul(d_table, scale, out=torch.empty_like(d_table, dtype=ctx.table_dtype))
        d_bias, d_odds = (None if part is None else part * scale for part in (d_bias, d_odds))
        return d_hidden, d_table, None, d_bias, d_odds


def _columns(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are scored, (N,), and the column of each one's target, (N,): 0 where it is not scored."""
    scored = targets != IGNORE
    return scored, targets.where(scored, 0)


def _chunk_tokens(hidden: Tensor, table: Tensor) -> int:
    return max(1, CHUNK_BYTES // (hidden.element_size() * table.shape[0]))


def _room(hidden: Tensor, table: Tensor) -> Tensor:
    """Memory for the logits of a chunk, (size, V), in the dtype of `hidden`, its rows aligned."""
    V = table.shape[0]
    return hidden.new_empty(min(_chunk_tokens(hidden, table), hidden.shape[0]), V + -V % ALIGNMENT)[:, :V]


def _parts(hidden: Tensor, logits: Tensor) -> list[slice]:
    """The tokens of each chunk."""
    return [slice(start, start + len(logits)) for start in range(0, len(hidden), len(logits))] if len(logits) else []


def _blocks(rows: Tensor) -> list[slice]:
    """The table's rows in two parts: as many as are a multiple of ALIGNMENT, and the few that are left."""
    V = len(rows)
    whole = V - V % ALIGNMENT
    return [block for block in (slice(0, whole), slice(whole, V)) if block.start < block.stop]


def _with_ones(hidden: Tensor) -> Tensor:
    """`hidden` and further columns, the last of them ones, so that one product sums gradients of table and bias.

    A sum of its own would take another pass, and for some vocabulary sizes more memory than the logits.
    """
    return F.pad(hidden, (0, ALIGNMENT), value=1.0)


def _logits(hidden: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    """hidden · rowsᵀ of a chunk, (n, V), written to the beginning of `logits`."""
    logits = logits[: len(hidden)]
    for block in _blocks(rows):
        torch.mm(hidden, rows[block].T, out=logits[:, block])
    return logits
