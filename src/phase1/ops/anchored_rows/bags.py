"""Anchored rows as embedding bags in both directions: no (n, k, D) tensor, no sorting, one order of additions."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.anchored_rows.reference import check_arguments

CHUNK_ROWS = 4096  # rows whose anchors are gathered at once for the gradient of their weights


class Users(NamedTuple):
    """The anchors turned round: who uses each row."""

    places: Tensor  # (n k,) places in the flattened anchors, sorted by anchor
    starts: Tensor  # (K + 1,) where the users of each row begin in `places`


def users_of(anchors: Tensor, count: int) -> Users:
    """The users of `count` rows, from `anchors` (n, k)."""
    used, places = anchors.flatten().sort(stable=True)
    return Users(places, torch.searchsorted(used, torch.arange(count + 1, device=used.device)))


def anchored_rows(rows: Tensor, weights: Tensor, anchors: Tensor, users: Users) -> Tensor:
    """Fast form of `anchored_rows_reference`, with the `users_of` its anchors: same result, gradients and errors."""
    check_arguments(rows, weights, anchors)
    result: Tensor = _AnchoredRows.apply(rows, weights, anchors, *users)
    return result


class _AnchoredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, anchors: Tensor, places: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, anchors, places, starts)
        return F.embedding_bag(anchors, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, weights, anchors, places, starts = ctx.saved_tensors
        k = anchors.shape[1]
        d_rows = F.embedding_bag(
            places // k, grad, starts, mode="sum", include_last_offset=True,
            per_sample_weights=weights.flatten()[places].to(grad.dtype),
        )  # fmt: skip
        parts = zip(anchors.split(CHUNK_ROWS), grad.split(CHUNK_ROWS), strict=True)
        d_weights = torch.cat([(rows[a] @ g[:, :, None]).squeeze(-1) for a, g in parts])
        return d_rows, d_weights.to(weights.dtype), None, None, None
