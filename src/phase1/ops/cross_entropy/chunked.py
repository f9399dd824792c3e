"""Tied cross-entropy by chunks of tokens, with gradients computed in the forward pass: no tokens × vocabulary tensor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phase1.ops.cross_entropy.products import add_product
from phase1.ops.cross_entropy.reference import ALIGNMENT, IGNORE, check_arguments
from phase1.ops.cross_entropy.rows import softmax_rows

CHUNK_BYTES = 512 * 2**20  # of logits held at once at most: 5,248 tokens of 50,257 in half precision
USUAL_PARTS = 4  # of these bytes one is held
TILE = 128  # rows of a tile in cuBLAS' larger products
LINE = 64  # numbers: rows of logits begin at multiples of it, so that kernels read them in whole lines


def tied_cross_entropy(
    hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None, log_odds: Tensor | None = None,
    parts: int = USUAL_PARTS,
) -> Tensor:  # fmt: skip
    """Fast form of `tied_cross_entropy_reference`: same result, gradients and errors.

    Args:
        parts: how many times fewer logits than CHUNK_BYTES to hold at once: the more, the slower, in less memory.
    """
    check_arguments(hidden, table, targets, bias, log_odds)
    loss: Tensor
    if torch.compiler.is_compiling():
        wanted = [x is not None and x.requires_grad for x in (hidden, table, bias, log_odds)]
        loss = _operator(hidden, table, targets, bias, log_odds, wanted, parts)[0]
    else:
        loss = _TiedCrossEntropy.apply(hidden, table, targets, bias, log_odds, parts)
    return loss


@torch.no_grad()
def tied_nll(hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The loss of each token, (N,), zero where the target is IGNORE; for evaluation, without gradients."""
    check_arguments(hidden, table, targets, bias)
    scored, target = _scored(targets)
    states, target = hidden[scored], target[scored]
    with torch.autocast(targets.device.type, enabled=False):
        rows = _padded(table, states.dtype)
        V = len(table) if bias is None else len(bias)
        buffer = _logits_buffer(states, V)
        target_log_prob = torch.empty_like(target, dtype=torch.promote_types(buffer.dtype, torch.float32))
        for chunk in _chunks(len(target), buffer):
            z = _logits(states[chunk], rows, buffer)[:, :V]
            softmax_rows(z, bias, target[chunk], target_log_prob[chunk], None)
    return target_log_prob.new_zeros(len(scored)).masked_scatter(scored, -target_log_prob)


class _Outcome(NamedTuple):
    """The mean loss, and the gradients of the *sum* of all losses, None for those that are not wanted."""

    loss: Tensor
    n_scored: Tensor  # at least 1: what the gradients are still to be divided by
    d_hidden: Tensor | None
    d_table: Tensor | None
    d_bias: Tensor | None
    d_odds: Tensor | None


def _compute(
    hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None, wanted: Sequence[bool],
    parts: int,
) -> _Outcome:  # fmt: skip
    """Loss and gradients in one pass: a chunk's gradients are computed while its probabilities exist.

    They are those of the sum of losses, so that half precision holds numbers of order 1. `wanted` says which are needed, of
    hidden, table, bias and log-odds.
    """
    (N, D), V = hidden.shape, len(table) if bias is None else len(bias)
    of_hidden, of_table, of_bias, of_odds = wanted
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    scored, target = _scored(targets)
    log_odds = None if log_odds is None else log_odds.to(acc_dtype).contiguous()
    with torch.autocast(targets.device.type, enabled=False):
        rows = _padded(table, hidden.dtype)
        ones = ALIGNMENT if of_bias else 0  # columns of ones beside the states: one product gives d_table and d_bias
        factor = F.pad(hidden, (0, ones), value=1.0) if of_bias else hidden
        d_hidden = hidden.new_empty(N, D) if of_hidden else None
        sums = hidden.new_zeros(len(rows), D + ones, dtype=acc_dtype) if of_table or of_bias else None
        target_log_prob = torch.empty_like(target, dtype=acc_dtype)
        buffer = _logits_buffer(hidden, V, parts)
        for chunk in _chunks(N, buffer):
            z = _logits(hidden[chunk], rows, buffer)  # softmax_rows overwrites them by their gradient
            odds = None if log_odds is None else log_odds[chunk]
            softmax_rows(z[:, :V], bias, target[chunk], target_log_prob[chunk], scored[chunk], odds)
            if d_hidden is not None:
                torch.mm(z, rows, out=d_hidden[chunk])
            if sums is not None:
                add_product(sums, z.T, factor[chunk])
        del buffer
    d_odds = -(log_odds - target_log_prob).sigmoid() * scored if log_odds is not None and of_odds else None
    if log_odds is not None:
        target_log_prob = target_log_prob + F.softplus(log_odds - target_log_prob)
    count = scored.sum()
    d_table = sums[: len(table), :D] if sums is not None and of_table else None
    d_bias = sums[:V, -1].contiguous() if sums is not None and of_bias else None
    return _Outcome(-(target_log_prob * scored).sum() / count, count.clamp(min=1), d_hidden, d_table, d_bias, d_odds)


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """`gradient` times `scale`, written in `dtype` at once: a float32 product would add a whole table to the peak."""
    if gradient is None:
        return None
    return torch.mul(gradient, scale, out=gradient.new_empty(gradient.shape, dtype=dtype or gradient.dtype))


class _TiedCrossEntropy(torch.autograd.Function):
    """`_compute` as an autograd function: the backward pass only scales the gradients that the forward pass made."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None, parts: int
    ) -> Tensor:
        of_hidden, of_table, _, of_bias, of_odds, _ = ctx.needs_input_grad
        outcome = _compute(hidden, table, targets, bias, log_odds, (of_hidden, of_table, of_bias, of_odds), parts)
        ctx.dtype = table.dtype
        ctx.save_for_backward(*outcome[1:])
        return outcome.loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        count, d_hidden, d_table, d_bias, d_odds = ctx.saved_tensors
        scale = d_loss / count
        return (
            _scaled(d_hidden, scale), _scaled(d_table, scale, ctx.dtype), None, _scaled(d_bias, scale), _scaled(d_odds, scale),
            None,
        )  # fmt: skip


def _padded(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table in `dtype`, with rows of zeros up to a multiple of ALIGNMENT: logits after the V real ones."""
    extra = -len(table) % ALIGNMENT
    if not extra:
        return table.to(dtype)
    padded = table.new_zeros(len(table) + extra, table.shape[1], dtype=dtype)
    padded[: len(table)] = table
    return padded


def _scored(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each token is scored, (N,), and its target, (N,), 0 if it is not."""
    scored = targets != IGNORE
    return scored, targets.where(scored, 0)


def _chunk_tokens(element_size: int, V: int, parts: int) -> int:
    """Tokens whose logits fit in a part of CHUNK_BYTES, a multiple of TILE if there are more than that."""
    tokens = max(1, CHUNK_BYTES // (parts * element_size * V))
    return tokens - tokens % TILE if tokens > TILE else tokens


def _logits_buffer(states: Tensor, V: int, parts: int = USUAL_PARTS) -> Tensor:
    """Memory for the logits of one chunk, (tokens, V + padding), in the dtype of the states; chunks are of one size, nearly."""
    width, most = V + -V % ALIGNMENT, _chunk_tokens(states.element_size(), V, parts)
    even = -(-len(states) // max(1, -(-len(states) // most)))
    size = min(most, len(states), even + -even % TILE)
    buffer = states.new_empty(size, width + -width % LINE)
    if not buffer.is_cuda:
        buffer[:, width:] = 0  # oneDNN's products in bfloat16 read past the end of rows: NaN there would be NaN everywhere
    return buffer[:, :width]


def _chunks(N: int, buffer: Tensor) -> list[slice]:
    """The chunks of N tokens, each no longer than `buffer`."""
    return [slice(start, start + len(buffer)) for start in range(0, N, len(buffer))] if len(buffer) else []


def _logits(states: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """The logits of some tokens, (n, len(rows)), written to the first n rows of `buffer`."""
    return torch.mm(states, rows.T, out=buffer[: len(states)])


@torch.library.custom_op(
    "phase1::tied_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor table, Tensor targets, Tensor? bias, Tensor? log_odds, bool[] wanted, int parts)"
    " -> (Tensor, Tensor[])",
)
def _operator(
    hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None, wanted: Sequence[bool],
    parts: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss; the number of scored tokens and the wanted gradients. One node of a compiled graph."""
    loss, n_scored, *gradients = _compute(hidden, table, targets, bias, log_odds, wanted, parts)
    return loss, [n_scored, *(gradient for gradient in gradients if gradient is not None)]


@_operator.register_fake
def _(
    hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None, wanted: Sequence[bool],
    parts: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    n, D = table.shape
    rows, columns = n + -n % ALIGNMENT, D + (ALIGNMENT if wanted[2] else 0)
    like = [hidden.new_empty(hidden.shape), hidden.new_empty(rows, columns, dtype=acc_dtype)[:n, :D]]
    like += [targets.new_empty(0 if x is None else x.shape, dtype=acc_dtype) for x in (bias, log_odds)]
    gradients = [x for x, needed in zip(like, wanted, strict=True) if needed]
    return targets.new_empty((), dtype=acc_dtype), [targets.new_empty(()), *gradients]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    _, table, _, _, _, ctx.wanted, _ = inputs
    ctx.dtype = table.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1])
    ctx.save_for_backward(*output[1])


def _backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Any, ...]:
    count, *gradients = ctx.saved_tensors
    scale, left = d_loss / count, iter(gradients)
    of = [next(left) if needed else None for needed in ctx.wanted]
    dtypes = None, ctx.dtype, None, None
    d_hidden, d_table, d_bias, d_odds = (_scaled(gradient, scale, dtype) for gradient, dtype in zip(of, dtypes))
    return d_hidden, d_table, None, d_bias, d_odds, None, None


_operator.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.phase1.tied_cross_entropy)
def _(hidden: Any, table: Any, targets: Any, bias: Any, log_odds: Any, wanted: Any, *_: Any, **__: Any) -> int:
    """One product for the logits, and one for each of hidden and table whose gradient is wanted."""
    return 2 * int(hidden[0]) * int(table[0]) * int(table[1]) * (1 + int(wanted[0]) + int(wanted[1]))
