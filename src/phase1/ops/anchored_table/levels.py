"""Build an anchored table level by level with embedding bags, forward and backward: no (n, k, D) tensor is ever made."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.anchored_table.reference import check_arguments

CHUNK_ROWS = 4096  # rows whose anchors are gathered at once for the gradient of their weights


class InverseIndex(NamedTuple):
    """The anchors of one level in compressed sparse row form: for each earlier row, the sums that it is an anchor of."""

    indices: Tensor  # (n k,) positions in the level's flattened anchors, sorted by the anchor that stands there
    offsets: Tensor  # (start of the level + 1,) row a is at indices[offsets[a] : offsets[a + 1]]


def inverse_index(anchors: Tensor, levels: Sequence[int]) -> list[InverseIndex]:
    """The inverse index of each level, from all `anchors` (V - K, k)."""
    found = []
    for start, end in pairwise(levels):
        used, indices = anchors[start - levels[0] : end - levels[0]].flatten().sort(stable=True)
        found.append(InverseIndex(indices, torch.searchsorted(used, torch.arange(start + 1, device=used.device))))
    return found


def anchored_table(
    own: Tensor, weights: Tensor, anchors: Tensor, levels: Sequence[int], inverse: Sequence[InverseIndex]
) -> Tensor:
    """Fast form of `anchored_table_reference`: same result, gradients and errors.

    Args:
        own: overwritten, it becomes the table.
        inverse: `inverse_index(anchors, levels)`, which a caller keeps for all its calls.
    """
    check_arguments(own, weights, anchors, levels)
    table: Tensor = _AnchoredTable.apply(own, weights, anchors, list(levels), *(tensor for part in inverse for tensor in part))
    return table


class _AnchoredTable(torch.autograd.Function):
    """Arguments as `anchored_table`, `inverse` as a flat list of its tensors; the table is made in the memory of `own`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor, anchors: Tensor, levels: list[int], *inverse: Tensor) -> Tensor:
        for start, end in pairwise(levels):
            level = slice(start - levels[0], end - levels[0])
            table[start:end] += _bags(table[:start], anchors[level], weights[level])
        ctx.levels = levels
        ctx.mark_dirty(table)
        ctx.save_for_backward(table, weights, anchors, *inverse)
        return table

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, weights, anchors, *inverse = ctx.saved_tensors
        k, first = anchors.shape[1], ctx.levels[0]
        grad, d_weights = grad.clone(), torch.empty_like(weights)
        indexed = list(zip(pairwise(ctx.levels), inverse[::2], inverse[1::2], strict=True))
        for (start, end), indices, offsets in reversed(indexed):
            level, d_rows = slice(start - first, end - first), grad[start:end]  # whole: later levels have added theirs
            grad[:start] += _bags(d_rows, indices // k, weights[level].flatten()[indices], offsets)
            chunks = (part.split(CHUNK_ROWS) for part in (d_weights[level], anchors[level], d_rows))
            for d_weight, anchor, d_row in zip(*chunks, strict=True):
                d_weight.copy_((table[anchor] @ d_row[:, :, None]).squeeze(-1))
        return grad, d_weights, None, None, *(None for _ in inverse)


def _bags(rows: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Weighted sums of `rows`, (n, D): one for each line of `indices`, or for each of its ranges if there are `offsets`."""
    return F.embedding_bag(
        indices, rows, offsets, mode="sum", include_last_offset=offsets is not None, per_sample_weights=weights.to(rows.dtype)
    )
