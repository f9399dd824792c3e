"""Tied cross-entropy by chunks of tokens, gradients taken on the way: memory does not grow with tokens × vocabulary."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.cross_entropy.reference import ALIGNMENT, IGNORE, Factors, check_arguments
from phase1.ops.cross_entropy.rows import softmax_rows

CHUNK_BYTES = 128 * 2**20  # of logits held at once: 1335 tokens of 50257 in half precision


def tied_cross_entropy(factors: Factors, targets: Tensor, bias: Tensor | None = None, log_odds: Tensor | None = None) -> Tensor:
    """Fast form of `tied_cross_entropy_reference`: same arguments, result, gradients and errors."""
    check_arguments(factors, targets, bias, log_odds)
    return _TiedCrossEntropy.apply(targets, bias, log_odds, *(tensor for pair in factors for tensor in pair))


@torch.no_grad()
def tied_nll(factors: Factors, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same losses token by token, (N,), zero where the target is IGNORE; for evaluation, without gradients."""
    check_arguments(factors, targets, bias)
    scored, column = _columns(targets)
    column = column[scored]
    with torch.autocast(targets.device.type, enabled=False):
        stretches = _stretches([states[scored] for states, _ in factors], [rows for _, rows in factors])
        logits = _room(stretches)
        picked = torch.empty_like(column, dtype=torch.promote_types(logits.dtype, torch.float32))
        for part in _parts(len(column), logits):
            z = _logits(stretches, part, logits)
            softmax_rows(z, bias, column[part], picked[part], None)
    return picked.new_zeros(len(scored)).masked_scatter(scored, -picked)


class _TiedCrossEntropy(torch.autograd.Function):
    """The gradients are taken in the forward pass, while a chunk's probabilities exist, for a sum of losses
    (so that half precision sees numbers of order 1), and scaled by the incoming gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None, *factors: Tensor) -> Tensor:
        hidden, tables = factors[::2], factors[1::2]
        _, need_bias, _, *need = ctx.needs_input_grad
        wide = torch.promote_types(hidden[0].dtype, torch.float32)
        scored, column = _columns(targets)
        log_odds = None if log_odds is None else log_odds.to(wide).contiguous()
        with torch.autocast(targets.device.type, enabled=False):
            stretches = _stretches(hidden, tables)
            d_hidden = [torch.zeros_like(h) if needed else None for h, needed in zip(hidden, need[::2])]
            d_tables = [torch.zeros_like(t, dtype=wide) if needed else None for t, needed in zip(tables, need[1::2])]
            d_bias = None if bias is None or not need_bias else torch.zeros_like(bias, dtype=wide)
            picked = torch.empty_like(column, dtype=wide)
            logits = _room(stretches)
            for part in _parts(len(targets), logits):
                d_logits = _logits(stretches, part, logits)  # the same memory: logits are not needed when it is written
                odds = None if log_odds is None else log_odds[part]
                softmax_rows(d_logits, bias, column[part], picked[part], scored[part], odds)
                for stretch, d_h, d_table in zip(stretches, d_hidden, d_tables, strict=True):
                    _add_gradients(stretch, part, d_logits, d_h, d_table, d_bias)
            del logits
        ctx.dtypes = [table.dtype for table in tables]
        count = scored.sum()
        d_odds = None if log_odds is None else -(log_odds - picked).sigmoid() * scored
        ctx.save_for_backward(d_bias, d_odds, count, *d_hidden, *d_tables)
        if log_odds is not None:
            picked = picked + F.softplus(log_odds - picked)
        return -(picked * scored).sum() / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_bias, d_odds, count, *sums = ctx.saved_tensors
        d_hidden, d_tables = sums[: len(ctx.dtypes)], sums[len(ctx.dtypes) :]
        scale = d_loss / count.clamp(min=1)  # where nothing is scored, the sums are 0, and so are the gradients
        pairs = zip(d_hidden, d_tables, ctx.dtypes, strict=True)
        scaled = [gradient for h, t, dtype in pairs for gradient in (_scaled(h, scale), _scaled(t, scale, dtype))]
        d_bias, d_odds = (None if part is None else part * scale for part in (d_bias, d_odds))
        return None, d_bias, d_odds, *scaled


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Straight into `dtype`, that of the table: a float32 product would be a table more at the peak."""
    return None if gradient is None else torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


class _Stretch(NamedTuple):
    """A stretch of the vocabulary: states (N, d), rows (V_j, d) in their dtype, and its columns of the logits."""

    states: Tensor
    rows: Tensor
    start: int

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns in two parts: as many as are a multiple of ALIGNMENT, and the few that are left."""
        V = len(self.rows)
        whole = V - V % ALIGNMENT
        for start, stop in ((0, whole), (whole, V)):
            if start < stop:
                yield slice(start, stop), slice(self.start + start, self.start + stop)


def _stretches(hidden: Sequence[Tensor], tables: Sequence[Tensor]) -> list[_Stretch]:
    starts = accumulate((len(table) for table in tables), initial=0)
    return [_Stretch(h, table.to(h.dtype), start) for h, table, start in zip(hidden, tables, starts)]


def _add_gradients(
    stretch: _Stretch, part: slice, d_logits: Tensor, d_hidden: Tensor | None, d_table: Tensor | None, d_bias: Tensor | None
) -> None:
    """Add what the tokens `part` have to say of a stretch's states, rows and bias."""
    states = stretch.states[part]
    factors = states if d_bias is None else _with_ones(states)
    for rows, columns in stretch.blocks():
        if d_hidden is not None:
            d_hidden[part] += d_logits[:, columns] @ stretch.rows[rows]
        if d_table is None and d_bias is None:
            continue
        sums = d_logits[:, columns].T @ factors
        if d_table is not None:
            d_table[rows] += sums[:, : states.shape[1]]
        if d_bias is not None:
            d_bias[columns] += sums[:, -1]
        del sums  # before the next, which is as large


def _columns(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are scored, (N,), and the column of each one's target, (N,): 0 where it is not scored."""
    scored = targets != IGNORE
    return scored, targets.where(scored, 0)


def _chunk_tokens(element_size: int, V: int) -> int:
    return max(1, CHUNK_BYTES // (element_size * V))


def _room(stretches: list[_Stretch]) -> Tensor:
    """Memory for the logits of a chunk, (size, V), in the dtype of the states, its rows aligned."""
    hidden, V = stretches[0].states, sum(len(stretch.rows) for stretch in stretches)
    size = min(_chunk_tokens(hidden.element_size(), V), len(hidden))
    return hidden.new_empty(size, V + -V % ALIGNMENT)[:, :V]


def _parts(N: int, logits: Tensor) -> list[slice]:
    """The tokens of each chunk."""
    return [slice(start, start + len(logits)) for start in range(0, N, len(logits))] if len(logits) else []


def _with_ones(hidden: Tensor) -> Tensor:
    """`hidden` and further columns, the last of them ones, so that one product sums gradients of table and bias.

    A sum of its own would take another pass, and for some vocabulary sizes more memory than the logits.
    """
    return F.pad(hidden, (0, ALIGNMENT), value=1.0)


def _logits(stretches: list[_Stretch], part: slice, logits: Tensor) -> Tensor:
    """The logits of the tokens `part`, (n, V), written to the beginning of `logits`."""
    logits = logits[: len(stretches[0].states[part])]
    for stretch in stretches:
        for rows, columns in stretch.blocks():
            torch.mm(stretch.states[part], stretch.rows[rows].T, out=logits[:, columns])
    return logits
