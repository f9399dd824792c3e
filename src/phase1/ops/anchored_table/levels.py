"""Anchored tables level by level, as embedding bags in both directions: no (n, k, D) tensor, one order of additions."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.anchored_table.reference import check_arguments

CHUNK_ROWS = 4096  # rows whose anchors are gathered at once for the gradient of their weights


class Users(NamedTuple):
    """The anchors of one level turned round: who uses each row."""

    places: Tensor  # (n k,) places in the flattened anchors, sorted by anchor
    starts: Tensor  # (start of the level + 1,) where the users of each row begin in `places`


def users_of(anchors: Tensor, levels: Sequence[int]) -> list[Users]:
    """The users of the rows before each level, from all `anchors` (V - K, k)."""
    users = []
    for start, end in pairwise(levels):
        used, places = anchors[start - levels[0] : end - levels[0]].flatten().sort(stable=True)
        users.append(Users(places, torch.searchsorted(used, torch.arange(start + 1, device=used.device))))
    return users


def anchored_table(own: Tensor, weights: Tensor, anchors: Tensor, levels: Sequence[int], users: Sequence[Users]) -> Tensor:
    """Fast form of `anchored_table_reference`, with the `users_of` its anchors: same result, gradients and errors.

    `own` is overwritten: it becomes the table.
    """
    check_arguments(own, weights, anchors, levels)
    table: Tensor = _AnchoredTable.apply(own, weights, anchors, list(levels), *(tensor for part in users for tensor in part))
    return table


class _AnchoredTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor, anchors: Tensor, levels: list[int], *users: Tensor) -> Tensor:
        for start, end in pairwise(levels):
            level = slice(start - levels[0], end - levels[0])
            table[start:end] += _bags(table[:start], anchors[level], weights[level])
        ctx.levels = levels
        ctx.mark_dirty(table)
        ctx.save_for_backward(table, weights, anchors, *users)
        return table

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, weights, anchors, *users = ctx.saved_tensors
        k, first = anchors.shape[1], ctx.levels[0]
        grad, d_weights = grad.clone(), torch.empty_like(weights)
        for (start, end), places, starts in reversed(list(zip(pairwise(ctx.levels), users[::2], users[1::2], strict=True))):
            level, d_rows = slice(start - first, end - first), grad[start:end]  # whole: later levels have added theirs
            grad[:start] += _bags(d_rows, places // k, weights[level].flatten()[places], starts)
            chunks = (part.split(CHUNK_ROWS) for part in (d_weights[level], anchors[level], d_rows))
            for d_weight, anchor, d_row in zip(*chunks, strict=True):
                d_weight.copy_((table[anchor] @ d_row[:, :, None]).squeeze(-1))
        return grad, d_weights, None, None, *(None for _ in users)


def _bags(rows: Tensor, indices: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Weighted sums of rows: of each line of `indices`, or of their stretches between `starts`."""
    return F.embedding_bag(
        indices, rows, starts, mode="sum", include_last_offset=starts is not None, per_sample_weights=weights.to(rows.dtype)
    )
