"""The levels of an HTT table: stretches of rows that are made alike."""

from itertools import pairwise
from typing import NamedTuple


class Level(NamedTuple):
    """A stretch of rows of an HTT table that are made alike."""

    start: int
    end: int
    rank: int
    """ρ, coefficients of each row; 0 in the tail."""
    anchors: int
    """k, rows before `start` that each row is a weighted sum of, besides; one number for all levels that have any."""


BAND_RANKS = (11, 8, 6, 3)  # ranks of the rows from K, 2K, 4K and 8K on, as multiples of r; the tail begins at 16K
ANCHORED_LEVEL = 2  # the first whose rows have anchors: from 4K on
VECTOR_DIM = 192  # of the vectors that decide anchors and where rows start


def levels(vocab_size: int, d_model: int, rank: int, dense_rows: int) -> list[Level]:
    """The levels of an HTT table past its dense rows: from K, 2K, 4K, 8K and 16K on, as far as V reaches."""
    starts, ranks = [0], [0]
    if dense_rows:
        starts = [dense_rows * 2**j for j in range(len(BAND_RANKS) + 1) if dense_rows * 2**j < vocab_size]
        ranks = [*(min(multiple * rank, d_model) for multiple in BAND_RANKS), 0]
    anchored = starts[min(ANCHORED_LEVEL, len(starts) - 1)]
    k = min(max(1, 3 * rank // 8), dense_rows)
    stretches = zip(pairwise([*starts, vocab_size]), ranks)
    return [Level(start, end, own, k if start >= anchored else 0) for (start, end), own in stretches]
