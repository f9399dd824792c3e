"""Tied cross-entropy by chunks of tokens, with gradients computed in the forward pass: no tokens × vocabulary tensor."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phase1.ops.cross_entropy.products import add_product
from phase1.ops.cross_entropy.reference import ALIGNMENT, IGNORE, Factors, check_arguments
from phase1.ops.cross_entropy.rows import softmax_rows

CHUNK_BYTES = 128 * 2**20  # of logits held at once: 1280 tokens of 50257 in half precision
TILE = 128  # rows of a tile in cuBLAS' larger products
LINE = 64  # numbers: rows of logits begin at multiples of it, so that kernels read them in whole lines


def tied_cross_entropy(factors: Factors, targets: Tensor, bias: Tensor | None = None, log_odds: Tensor | None = None) -> Tensor:
    """Fast form of `tied_cross_entropy_reference`: same arguments, result, gradients and errors."""
    check_arguments(factors, targets, bias, log_odds)
    loss: Tensor
    if torch.compiler.is_compiling():
        states, tables = [h for h, _ in factors], [rows for _, rows in factors]
        wanted = [x is not None and x.requires_grad for x in (*states, *tables, bias, log_odds)]
        loss = _operator(states, tables, targets, bias, log_odds, wanted)[0]
    else:
        loss = _TiedCrossEntropy.apply(targets, bias, log_odds, *(tensor for pair in factors for tensor in pair))
    return loss


@torch.no_grad()
def tied_nll(factors: Factors, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The loss of each token, (N,), zero where the target is IGNORE; for evaluation, without gradients."""
    check_arguments(factors, targets, bias)
    scored, target = _scored(targets)
    target = target[scored]
    with torch.autocast(targets.device.type, enabled=False):
        shards = _shards([states[scored] for states, _ in factors], [rows for _, rows in factors])
        V = sum(len(rows) for _, rows in factors)
        buffer = _logits_buffer(shards, V)
        target_log_prob = torch.empty_like(target, dtype=torch.promote_types(buffer.dtype, torch.float32))
        for chunk in _chunks(len(target), buffer):
            softmax_rows(_logits(shards, chunk, buffer)[:, :V], bias, target[chunk], target_log_prob[chunk], None)
    return target_log_prob.new_zeros(len(scored)).masked_scatter(scored, -target_log_prob)


class _Outcome(NamedTuple):
    """The mean loss, and the gradients of the *sum* of all losses, None for those that are not wanted."""

    loss: Tensor
    n_scored: Tensor  # at least 1: what the gradients are still to be divided by
    d_states: list[Tensor | None]
    d_tables: list[Tensor | None]
    d_bias: Tensor | None
    d_odds: Tensor | None


def _compute(
    states: Sequence[Tensor], tables: Sequence[Tensor], targets: Tensor, bias: Tensor | None, log_odds: Tensor | None,
    wanted: Sequence[bool],
) -> _Outcome:  # fmt: skip
    """Loss and gradients in one pass: a chunk's gradients are computed while its probabilities exist.

    They are those of the sum of losses, so that half precision holds numbers of order 1. `wanted` says which are needed: of
    each of the states, each of the tables, the bias and the log-odds.
    """
    n, V = len(states), sum(len(rows) for rows in tables)
    acc_dtype = torch.promote_types(states[0].dtype, torch.float32)
    scored, target = _scored(targets)
    log_odds = None if log_odds is None else log_odds.to(acc_dtype).contiguous()
    with torch.autocast(targets.device.type, enabled=False):
        shards = _shards(states, tables)
        ones = ALIGNMENT if wanted[-2] else 0  # columns of ones beside the states: one product gives d_table and d_bias
        factors = [F.pad(h, (0, ones), value=1.0) if ones else h for h in states]
        d_states = [h.new_empty(h.shape) if needed else None for h, needed in zip(states, wanted[:n])]
        sums = [
            rows.new_zeros(len(rows), rows.shape[1] + ones, dtype=acc_dtype) if needed or ones else None
            for (_, rows, _), needed in zip(shards, wanted[n:])
        ]
        target_log_prob = torch.empty_like(target, dtype=acc_dtype)
        buffer = _logits_buffer(shards, V)
        for chunk in _chunks(len(targets), buffer):
            z = _logits(shards, chunk, buffer)  # softmax_rows overwrites them by their gradient
            odds = None if log_odds is None else log_odds[chunk]
            softmax_rows(z[:, :V], bias, target[chunk], target_log_prob[chunk], scored[chunk], odds)
            for shard, factor, d_h, total in zip(shards, factors, d_states, sums, strict=True):
                d_z = shard.columns(z)
                if d_h is not None:
                    torch.mm(d_z, shard.rows, out=d_h[chunk])
                if total is not None:
                    add_product(total, d_z.T, factor[chunk])
        del buffer
    d_odds = -(log_odds - target_log_prob).sigmoid() * scored if log_odds is not None and wanted[-1] else None
    if log_odds is not None:
        target_log_prob = target_log_prob + F.softplus(log_odds - target_log_prob)
    count = scored.sum()
    pairs = list(zip(sums, tables))
    d_bias = torch.cat([total[: len(rows), -1] for total, rows in pairs if total is not None]) if ones else None
    d_tables = [
        total[: len(rows), : rows.shape[1]] if needed and total is not None else None
        for (total, rows), needed in zip(pairs, wanted[n:])
    ]
    return _Outcome(-(target_log_prob * scored).sum() / count, count.clamp(min=1), d_states, d_tables, d_bias, d_odds)


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """`gradient` times `scale`, written in `dtype` at once: a float32 product would add a whole table to the peak."""
    if gradient is None:
        return None
    return torch.mul(gradient, scale, out=gradient.new_empty(gradient.shape, dtype=dtype or gradient.dtype))


class _TiedCrossEntropy(torch.autograd.Function):
    """`_compute` as an autograd function: the backward pass only scales the gradients that the forward pass made."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None, *factors: Tensor) -> Tensor:
        _, need_bias, need_odds, *need = ctx.needs_input_grad
        wanted = [*need[::2], *need[1::2], need_bias, need_odds]
        outcome = _compute(factors[::2], factors[1::2], targets, bias, log_odds, wanted)
        ctx.dtypes = [table.dtype for table in factors[1::2]]
        ctx.save_for_backward(outcome.n_scored, outcome.d_bias, outcome.d_odds, *outcome.d_states, *outcome.d_tables)
        return outcome.loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        count, d_bias, d_odds, *sums = ctx.saved_tensors
        n, scale = len(ctx.dtypes), d_loss / count
        pairs = zip(sums[:n], sums[n:], ctx.dtypes, strict=True)
        scaled = [gradient for h, t, dtype in pairs for gradient in (_scaled(h, scale), _scaled(t, scale, dtype))]
        return None, _scaled(d_bias, scale), _scaled(d_odds, scale), *scaled


class _VocabShard(NamedTuple):
    """Consecutive rows of the vocabulary that share one width d, as one factor of the output has them."""

    states: Tensor  # (N, d)
    rows: Tensor  # (V_j, d), in the dtype of the states
    start: int  # its first column of the logits

    def columns(self, logits: Tensor) -> Tensor:
        """The shard's columns of `logits` (n, V)."""
        return logits[:, self.start : self.start + len(self.rows)]


def _shards(states: Sequence[Tensor], tables: Sequence[Tensor]) -> list[_VocabShard]:
    """One shard a table; the last is padded with zero rows to a multiple of ALIGNMENT: logits after the V real ones."""
    starts = accumulate((len(table) for table in tables), initial=0)
    extra = [0] * (len(tables) - 1) + [-len(tables[-1]) % ALIGNMENT]
    return [
        _VocabShard(h, _padded(table, more, h.dtype), start) for h, table, start, more in zip(states, tables, starts, extra)
    ]


def _padded(rows: Tensor, extra: int, dtype: torch.dtype) -> Tensor:
    if not extra:
        return rows.to(dtype)
    padded = rows.new_zeros(len(rows) + extra, rows.shape[1], dtype=dtype)
    padded[: len(rows)] = rows
    return padded


def _scored(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each token is scored, (N,), and its target, (N,), 0 if it is not."""
    scored = targets != IGNORE
    return scored, targets.where(scored, 0)


def _chunk_tokens(element_size: int, V: int) -> int:
    """Tokens whose logits fit in CHUNK_BYTES, a multiple of TILE if there are more than that."""
    tokens = max(1, CHUNK_BYTES // (element_size * V))
    return tokens - tokens % TILE if tokens > TILE else tokens


def _logits_buffer(shards: list[_VocabShard], V: int) -> Tensor:
    """Memory for the logits of one chunk, (tokens, V + padding), in the dtype of the states."""
    states, last = shards[0].states, shards[-1]
    width = last.start + len(last.rows)
    size = min(_chunk_tokens(states.element_size(), V), len(states))
    return states.new_empty(size, width + -width % LINE)[:, :width]


def _chunks(N: int, buffer: Tensor) -> list[slice]:
    """The chunks of N tokens, each no longer than `buffer`."""
    return [slice(start, start + len(buffer)) for start in range(0, N, len(buffer))] if len(buffer) else []


def _logits(shards: list[_VocabShard], chunk: slice, buffer: Tensor) -> Tensor:
    """The logits of the tokens of `chunk`, (n, V + padding), written to the first n rows of `buffer`."""
    logits = buffer[: len(shards[0].states[chunk])]
    for shard in shards:
        torch.mm(shard.states[chunk], shard.rows.T, out=shard.columns(logits))
    return logits


@torch.library.custom_op(
    "phase1::tied_cross_entropy",
    mutates_args=(),
    schema="(Tensor[] states, Tensor[] tables, Tensor targets, Tensor? bias, Tensor? log_odds, bool[] wanted)"
    " -> (Tensor, Tensor[])",
)
def _operator(
    states: Sequence[Tensor], tables: Sequence[Tensor], targets: Tensor, bias: Tensor | None, log_odds: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss; the number of scored tokens and the wanted gradients. One node of a compiled graph."""
    outcome = _compute(states, tables, targets, bias, log_odds, wanted)
    gradients = (*outcome.d_states, *outcome.d_tables, outcome.d_bias, outcome.d_odds)
    return outcome.loss, [outcome.n_scored, *(gradient for gradient in gradients if gradient is not None)]


@_operator.register_fake
def _(
    states: Sequence[Tensor], tables: Sequence[Tensor], targets: Tensor, bias: Tensor | None, log_odds: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    acc_dtype = torch.promote_types(states[0].dtype, torch.float32)
    ones = ALIGNMENT if wanted[-2] else 0
    like = [h.new_empty(h.shape) for h in states]
    for i, rows in enumerate(tables):
        more = -len(rows) % ALIGNMENT if i == len(tables) - 1 else 0
        like.append(rows.new_empty(len(rows) + more, rows.shape[1] + ones, dtype=acc_dtype)[: len(rows), : rows.shape[1]])
    like += [targets.new_empty(0 if x is None else x.shape, dtype=acc_dtype) for x in (bias, log_odds)]
    gradients = [x for x, needed in zip(like, wanted, strict=True) if needed]
    return targets.new_empty((), dtype=acc_dtype), [targets.new_empty(()), *gradients]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    _, tables, _, _, _, ctx.wanted = inputs
    ctx.dtypes = [table.dtype for table in tables]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1])
    ctx.save_for_backward(*output[1])


def _backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Any, ...]:
    count, *gradients = ctx.saved_tensors
    n, scale = len(ctx.dtypes), d_loss / count
    left = iter(gradients)
    dtypes = [None] * n + ctx.dtypes + [None] * 2
    scaled = [_scaled(next(left), scale, dtype) if needed else None for needed, dtype in zip(ctx.wanted, dtypes, strict=True)]
    return scaled[:n], scaled[n : 2 * n], None, *scaled[2 * n :], None


_operator.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.phase1.tied_cross_entropy)
def _(states: Any, tables: Any, targets: Any, bias: Any, log_odds: Any, wanted: Any, **_: Any) -> int:
    """One product a shard for the logits, and one for each gradient that is wanted."""
    n = len(states)
    products = [1 + int(wanted[i]) + int(wanted[n + i]) for i in range(n)]
    return sum(2 * int(h[0]) * int(rows[0]) * int(rows[1]) * times for h, rows, times in zip(states, tables, products))
