"""The anchored table as an operator: Triton kernels on a GPU that can run them, embedding bags elsewhere."""

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phase1.ops.anchored_table import levels as bags
from phase1.ops.anchored_table.inverse import InverseIndex
from phase1.ops.anchored_table.reference import check_arguments
from phase1.ops.card import runs_kernels


def anchored_table(
    own: Sequence[Tensor], weights: Tensor, anchors: Tensor, levels: Sequence[int], inverse: InverseIndex, dtype: torch.dtype,
    zeros: int = 0,
) -> Tensor:  # fmt: skip
    """Fast form of `anchored_table_reference`: same result, gradients and errors.

    Args:
        inverse: `inverse_index(anchors, levels)`, which a caller keeps for all its calls.
        zeros: rows of zeros to put at the end of the table.
    """
    check_arguments(own, weights, anchors, levels)
    parts = _within_levels(own, levels)
    if _without_operator(weights):
        return bags.table(parts, weights, anchors, levels, dtype, zeros)
    table: Tensor = _table(parts, weights, anchors, list(levels), list(inverse), dtype, zeros)
    return table


def _without_operator(weights: Tensor) -> bool:
    """Whether nothing asks for an operator, whose first call on a CPU imports the compiler: a second of every generation."""
    plain = type(weights) in (Tensor, torch.nn.Parameter) and weights.device.type == "cpu"
    return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _within_levels(own: Sequence[Tensor], levels: Sequence[int]) -> list[Tensor]:
    """`own` in parts none of which belongs to two levels; that of the model is."""
    parts: list[Tensor] = []
    for part, begin in zip(own, accumulate(map(len, own), initial=0)):
        cuts = [level - begin for level in levels if 0 < level - begin < len(part)]
        parts += part.tensor_split(cuts) if cuts else [part]
    return parts


@torch.library.custom_op("phase1::anchored_table", mutates_args=())
def _table(
    own: Sequence[Tensor],
    weights: Tensor,
    anchors: Tensor,
    levels: Sequence[int],
    inverse: Sequence[Tensor],
    dtype: torch.dtype,
    zeros: int,
) -> Tensor:
    return _form(weights, dtype).table(own, weights, anchors, levels, dtype, zeros)


@_table.register_fake
def _(
    own: Sequence[Tensor],
    weights: Tensor,
    anchors: Tensor,
    levels: Sequence[int],
    inverse: Sequence[Tensor],
    dtype: torch.dtype,
    zeros: int,
) -> Tensor:
    return own[0].new_empty(levels[-1] + zeros, own[0].shape[1], dtype=dtype)


@torch.library.custom_op("phase1::anchored_table_backward", mutates_args=())
def _gradients(
    d_table: Tensor, table: Tensor, own: Sequence[Tensor], weights: Tensor, anchors: Tensor, inverse: Sequence[Tensor],
    levels: Sequence[int],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of `own`, the parts before the last level, and of weights."""
    with torch.autocast(table.device.type, enabled=False):
        return _form(weights, table.dtype).gradients(d_table, table, own, weights, anchors, inverse, levels)


@_gradients.register_fake
def _(
    d_table: Tensor, table: Tensor, own: Sequence[Tensor], weights: Tensor, anchors: Tensor, inverse: Sequence[Tensor],
    levels: Sequence[int],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    *d_own, d_weights = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*own, weights))
    return d_own, d_weights


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    own, weights, anchors, ctx.levels, inverse, _, _ = inputs
    last = [0, *ctx.levels][-2]
    ctx.inner = sum(begin < last for begin in accumulate(map(len, own[:-1]), initial=0))  # parts before the last level
    ctx.outer = [(len(part), part.shape[1], part.dtype) for part in own[ctx.inner :]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output, weights, anchors, *inverse, *own[: ctx.inner])


def _backward(ctx: Any, d_table: Tensor | None) -> tuple[Any, ...]:
    if d_table is None:
        return [None] * (ctx.inner + len(ctx.outer)), None, None, None, [None] * len(InverseIndex._fields), None, None
    table, weights, anchors, *rest = ctx.saved_tensors
    inverse, own = rest[: len(InverseIndex._fields)], rest[len(InverseIndex._fields) :]
    d_own, d_weights = _gradients(d_table, table, own, weights, anchors, inverse, ctx.levels)
    at = sum(map(len, own))
    for rows, width, dtype in ctx.outer:  # nobody uses these rows: their gradients have come whole
        d_own = [*d_own, d_table[at : at + rows, :width].to(dtype)]
        at += rows
    return d_own, d_weights, None, None, [None] * len(inverse), None, None


_table.register_autograd(_backward, setup_context=_keep)


def _form(weights: Tensor, dtype: torch.dtype) -> ModuleType:
    """The kernels or embedding bags, whichever can compute in such a type where the weights are."""
    if torch.float64 in (weights.dtype, dtype) or not runs_kernels(weights, dtype):
        return bags
    from phase1.ops.anchored_table import kernel  # Triton takes a second to import

    return kernel


@register_flop_formula(torch.ops.phase1.anchored_table)
def _(own: Any, weights: Any, *_: Any, **__: Any) -> int:
    """A multiplication and an addition for each anchor and coordinate."""
    return 2 * int(weights[0]) * int(weights[1]) * int(own[0][1])


@register_flop_formula(torch.ops.phase1.anchored_table_backward)
def _(d_table: Any, table: Any, own: Any, weights: Any, *_: Any, **__: Any) -> int:
    """As much for the anchors, and as much for the weights."""
    return 4 * int(weights[0]) * int(weights[1]) * int(table[1])
