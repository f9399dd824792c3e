"""The anchors of a table turned round: who uses each row, cut into stretches that one program can add up."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRETCH = 64  # users of a row that a program adds up; of a frequent token's row there are thousands


class Users(NamedTuple):
    """The users of each row before the last level: sizes depend on those of the anchors alone."""

    places: Tensor  # (n k,) places in the flattened anchors, sorted by anchor
    starts: Tensor  # (rows + 1,) where the users of each row begin in `places`
    firsts: Tensor  # (rows + 1,) the first whole stretch of each row; what is left of its users is in none
    stretches: Tensor  # (n k // STRETCH,) the row of each whole stretch; `rows` where there are no more


def users_of(anchors: Tensor, levels: Sequence[int]) -> Users:
    """The users of all rows, from the `anchors` (V - K, k) of all levels."""
    rows = [0, *levels][-2]
    used, places = anchors.flatten().sort(stable=True)
    starts = torch.searchsorted(used, torch.arange(rows + 1, device=used.device))
    firsts = torch.cat([starts.new_zeros(1), (starts.diff() // STRETCH).cumsum(0)])
    every = torch.arange(len(places) // STRETCH, device=used.device)
    return Users(places, starts, firsts, torch.searchsorted(firsts[1:], every, right=True))
