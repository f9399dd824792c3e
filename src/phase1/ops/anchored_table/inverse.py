"""The inverse of the anchors of a table: for each row its users, the rows that it is an anchor of, cut into chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # users of a row that one program adds up; the row of a frequent token has thousands


class InverseIndex(NamedTuple):
    """Compressed sparse rows for the rows before the last level; the sizes of these tensors depend on no anchor."""

    indices: Tensor  # (n k,) positions in the flattened anchors, sorted by the anchor that stands there
    offsets: Tensor  # (rows + 1,) the users of row a are at indices[offsets[a] : offsets[a + 1]]
    chunk_offsets: Tensor  # (rows + 1,) the first whole chunk of each row; what is left of its users is in none
    chunk_rows: Tensor  # (n k // CHUNK,) the row of each whole chunk; `rows` where there are no more


def inverse_index(anchors: Tensor, levels: Sequence[int]) -> InverseIndex:
    """The inverse index of the `anchors` (V - K, k) of all levels."""
    rows = [0, *levels][-2]
    used, indices = anchors.flatten().sort(stable=True)
    offsets = torch.searchsorted(used, torch.arange(rows + 1, device=used.device))
    chunk_offsets = torch.cat([offsets.new_zeros(1), (offsets.diff() // CHUNK).cumsum(0)])
    every = torch.arange(len(indices) // CHUNK, device=used.device)
    return InverseIndex(indices, offsets, chunk_offsets, torch.searchsorted(chunk_offsets[1:], every, right=True))
