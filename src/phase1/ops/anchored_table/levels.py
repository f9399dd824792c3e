"""Anchored tables level by level, as embedding bags in both directions: no (n, k, D) tensor, one order of additions."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 4096  # rows whose anchors are gathered at once for the gradient of their weights


def table(
    own: Sequence[Tensor], weights: Tensor, anchors: Tensor, levels: Sequence[int], dtype: torch.dtype, zeros: int = 0
) -> Tensor:
    """The table, (V + zeros, D)."""
    D = own[0].shape[1]
    table = torch.cat([F.pad(part.to(dtype), (0, D - part.shape[1])) for part in (*own, own[0].new_zeros(zeros, D))])
    for start, end in pairwise(levels):
        level = slice(start - levels[0], end - levels[0])
        table[start:end] += _bags(table[:start], anchors[level], weights[level])
    return table


def gradients(
    d_table: Tensor, table: Tensor, own: Sequence[Tensor], weights: Tensor, anchors: Tensor, inverse: Sequence[Tensor],
    levels: Sequence[int],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Those of `own`, the parts before the last level, and of the weights; users are found again, level by level."""
    (k, first), d_rows, d_weights = (anchors.shape[1], levels[0]), d_table.clone(), torch.empty_like(weights)
    for start, end in reversed(list(pairwise(levels))):
        level, d_level = slice(start - first, end - first), d_rows[start:end]  # whole: later levels have added theirs
        used, indices = anchors[level].flatten().sort(stable=True)
        offsets = torch.searchsorted(used, torch.arange(start + 1, device=used.device))
        d_rows[:start] += _bags(d_level, indices // k, weights[level].flatten()[indices], offsets)
        chunks = (part.split(CHUNK_ROWS) for part in (d_weights[level], anchors[level], d_level))
        for d_weight, anchor, d_row in zip(*chunks, strict=True):
            d_weight.copy_((table[anchor] @ d_row[:, :, None]).squeeze(-1))
    ends = torch.tensor([0, *map(len, own)]).cumsum(0).tolist()
    parts = zip(pairwise(ends), own, strict=True)
    return [d_rows[start:end, : part.shape[1]].to(part.dtype, copy=True) for (start, end), part in parts], d_weights


def _bags(rows: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Weighted sums of rows: of each line of `indices`, or of their chunk_rows between `offsets`."""
    return F.embedding_bag(
        indices, rows, offsets, mode="sum", include_last_offset=offsets is not None, per_sample_weights=weights.to(rows.dtype)
    )
