"""Tied cross-entropy by chunks of tokens, gradients taken on the way: memory does not grow with tokens × vocabulary."""

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
    """The same losses token by token, (N,), zero where the target is IGNORE; for evaluation, without gradients."""
    check_arguments(factors, targets, bias)
    scored, column = _columns(targets)
    column = column[scored]
    with torch.autocast(targets.device.type, enabled=False):
        stretches = _stretches([states[scored] for states, _ in factors], [rows for _, rows in factors])
        V = sum(len(rows) for _, rows in factors)
        room = _room(stretches, V)
        picked = torch.empty_like(column, dtype=torch.promote_types(room.dtype, torch.float32))
        for part in _parts(len(column), room):
            softmax_rows(_logits(stretches, part, room)[:, :V], bias, column[part], picked[part], None)
    return picked.new_zeros(len(scored)).masked_scatter(scored, -picked)


class _Outcome(NamedTuple):
    """The loss, and the gradients of the sum of all losses with the number to divide them by; None where none is wanted."""

    loss: Tensor
    scored: Tensor
    d_states: list[Tensor | None]
    d_tables: list[Tensor | None]
    d_bias: Tensor | None
    d_odds: Tensor | None


def _compute(
    states: Sequence[Tensor], tables: Sequence[Tensor], targets: Tensor, bias: Tensor | None, log_odds: Tensor | None,
    wanted: Sequence[bool],
) -> _Outcome:  # fmt: skip
    """The gradients are taken while a chunk's probabilities exist, for a sum of losses, so that half precision sees numbers
    of order 1; `wanted`, those of states, tables, bias and log-odds in that order."""
    n, V = len(states), sum(len(rows) for rows in tables)
    wide = torch.promote_types(states[0].dtype, torch.float32)
    scored, column = _columns(targets)
    log_odds = None if log_odds is None else log_odds.to(wide).contiguous()
    with torch.autocast(targets.device.type, enabled=False):
        stretches = _stretches(states, tables)
        ones = ALIGNMENT if wanted[-2] else 0  # columns of ones beside the states: one product sums the gradients of both
        d_states = [h.new_empty(h.shape) if needed else None for h, needed in zip(states, wanted[:n])]
        sums = [
            rows.new_zeros(len(rows), rows.shape[1] + ones, dtype=wide) if needed or ones else None
            for (_, rows, _), needed in zip(stretches, wanted[n:])
        ]
        picked = torch.empty_like(column, dtype=wide)
        room = _room(stretches, V)
        for part in _parts(len(targets), room):
            z = _logits(stretches, part, room)  # and their gradient in the same memory: they are not needed when it is written
            odds = None if log_odds is None else log_odds[part]
            softmax_rows(z[:, :V], bias, column[part], picked[part], scored[part], odds)
            for stretch, d_h, total in zip(stretches, d_states, sums, strict=True):
                d_z = stretch.columns(z)
                if d_h is not None:
                    torch.mm(d_z, stretch.rows, out=d_h[part])
                if total is not None:
                    factors = stretch.states[part]
                    add_product(total, d_z.T, F.pad(factors, (0, ones), value=1.0) if ones else factors)
        del room
    d_odds = -(log_odds - picked).sigmoid() * scored if log_odds is not None and wanted[-1] else None
    if log_odds is not None:
        picked = picked + F.softplus(log_odds - picked)
    count = scored.sum()
    pairs = list(zip(sums, tables))
    d_bias = torch.cat([total[: len(rows), -1] for total, rows in pairs if total is not None]) if ones else None
    d_tables = [
        total[: len(rows), : rows.shape[1]] if needed and total is not None else None
        for (total, rows), needed in zip(pairs, wanted[n:])
    ]
    return _Outcome(-(picked * scored).sum() / count, count.clamp(min=1), d_states, d_tables, d_bias, d_odds)


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Straight into `dtype`, that of the table: a float32 product would be a table more at the peak."""
    if gradient is None:
        return None
    return torch.mul(gradient, scale, out=gradient.new_empty(gradient.shape, dtype=dtype or gradient.dtype))


class _TiedCrossEntropy(torch.autograd.Function):
    """`_compute`, its gradients scaled by the incoming one."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None, *factors: Tensor) -> Tensor:
        _, need_bias, need_odds, *need = ctx.needs_input_grad
        wanted = [*need[::2], *need[1::2], need_bias, need_odds]
        outcome = _compute(factors[::2], factors[1::2], targets, bias, log_odds, wanted)
        ctx.dtypes = [table.dtype for table in factors[1::2]]
        ctx.save_for_backward(outcome.scored, outcome.d_bias, outcome.d_odds, *outcome.d_states, *outcome.d_tables)
        return outcome.loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        count, d_bias, d_odds, *sums = ctx.saved_tensors
        n, scale = len(ctx.dtypes), d_loss / count
        pairs = zip(sums[:n], sums[n:], ctx.dtypes, strict=True)
        scaled = [gradient for h, t, dtype in pairs for gradient in (_scaled(h, scale), _scaled(t, scale, dtype))]
        return None, _scaled(d_bias, scale), _scaled(d_odds, scale), *scaled


class _Stretch(NamedTuple):
    """A stretch of the vocabulary: states (N, d), rows (V_j, d) in their dtype, and where its columns of the logits begin."""

    states: Tensor
    rows: Tensor
    start: int

    def columns(self, logits: Tensor) -> Tensor:
        return logits[:, self.start : self.start + len(self.rows)]


def _stretches(states: Sequence[Tensor], tables: Sequence[Tensor]) -> list[_Stretch]:
    """Rows of zeros make the last stretch, of odd length if V is, a multiple of ALIGNMENT: their logits are past the last."""
    starts = accumulate((len(table) for table in tables), initial=0)
    extra = [0] * (len(tables) - 1) + [-len(tables[-1]) % ALIGNMENT]
    return [_Stretch(h, _padded(table, more, h.dtype), start) for h, table, start, more in zip(states, tables, starts, extra)]


def _padded(rows: Tensor, extra: int, dtype: torch.dtype) -> Tensor:
    if not extra:
        return rows.to(dtype)
    padded = rows.new_zeros(len(rows) + extra, rows.shape[1], dtype=dtype)
    padded[: len(rows)] = rows
    return padded


def _columns(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are scored, (N,), and the column of each one's target, (N,): 0 where it is not scored."""
    scored = targets != IGNORE
    return scored, targets.where(scored, 0)


def _chunk_tokens(element_size: int, V: int) -> int:
    """As many as CHUNK_BYTES hold, whole tiles of a product of them."""
    tokens = max(1, CHUNK_BYTES // (element_size * V))
    return tokens - tokens % TILE if tokens > TILE else tokens


def _room(stretches: list[_Stretch], V: int) -> Tensor:
    """Memory for the logits of a chunk, (size, V and more), in the dtype of the states."""
    states, last = stretches[0].states, stretches[-1]
    width = last.start + len(last.rows)
    size = min(_chunk_tokens(states.element_size(), V), len(states))
    return states.new_empty(size, width + -width % LINE)[:, :width]


def _parts(N: int, room: Tensor) -> list[slice]:
    """The tokens of each chunk."""
    return [slice(start, start + len(room)) for start in range(0, N, len(room))] if len(room) else []


def _logits(stretches: list[_Stretch], part: slice, room: Tensor) -> Tensor:
    """The logits of the tokens `part`, (n, V and 0 past it), written to the beginning of `room`."""
    logits = room[: len(stretches[0].states[part])]
    for stretch in stretches:
        torch.mm(stretch.states[part], stretch.rows.T, out=stretch.columns(logits))
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
    """The loss, the number of scored tokens and the gradients that are wanted: all of it one node of a compiled graph."""
    outcome = _compute(states, tables, targets, bias, log_odds, wanted)
    gradients = (*outcome.d_states, *outcome.d_tables, outcome.d_bias, outcome.d_odds)
    return outcome.loss, [outcome.scored, *(gradient for gradient in gradients if gradient is not None)]


@_operator.register_fake
def _(
    states: Sequence[Tensor], tables: Sequence[Tensor], targets: Tensor, bias: Tensor | None, log_odds: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    wide = torch.promote_types(states[0].dtype, torch.float32)
    ones = ALIGNMENT if wanted[-2] else 0
    like = [h.new_empty(h.shape) for h in states]
    for i, rows in enumerate(tables):
        more = -len(rows) % ALIGNMENT if i == len(tables) - 1 else 0
        like.append(rows.new_empty(len(rows) + more, rows.shape[1] + ones, dtype=wide)[: len(rows), : rows.shape[1]])
    like += [targets.new_empty(0 if x is None else x.shape, dtype=wide) for x in (bias, log_odds)]
    gradients = [x for x, needed in zip(like, wanted, strict=True) if needed]
    return targets.new_empty((), dtype=wide), [targets.new_empty(()), *gradients]


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
    """Three products a stretch; less those of gradients that nobody wants."""
    n = len(states)
    products = [1 + int(wanted[i]) + int(wanted[n + i]) for i in range(n)]
    return sum(2 * int(h[0]) * int(rows[0]) * int(rows[1]) * times for h, rows, times in zip(states, tables, products))
