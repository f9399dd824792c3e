"""The levels of an HTT table: ranges of rows that share one rank and one way of being computed."""

from itertools import pairwise
from typing import NamedTuple


class Level(NamedTuple):
    """Rows `start` to `end` - 1 of an HTT table."""

    start: int
    end: int
    rank: int
    """ρ, coefficients of each row; 0 in the tail, which is a tensor train."""
    anchors: int
    """k, earlier rows whose weighted sum is added to each row; the same number for all levels that have anchors."""


BAND_RANKS = (11, 8, 6, 3)  # ρ/r of the rows from K, 2K, 4K and 8K on (K = dense rows, 2K = twice as many); the tail: 16K
ANCHORED_LEVEL = 2  # the first whose rows have anchors: from 4K on
VECTOR_DIM = 192  # dimension of the token vectors that anchors and initial rows are computed from


def levels(vocab_size: int, d_model: int, rank: int, dense_rows: int) -> list[Level]:
    """The levels of an HTT table after its K = `dense_rows`: they start at K, 2K, 4K, 8K and 16K, as far as V reaches."""
    starts, ranks = [0], [0]
    if dense_rows:
        starts = [dense_rows * 2**j for j in range(len(BAND_RANKS) + 1) if dense_rows * 2**j < vocab_size]
        ranks = [*(min(multiple * rank, d_model) for multiple in BAND_RANKS), 0]
    anchored = starts[min(ANCHORED_LEVEL, len(starts) - 1)]
    k = min(max(1, 3 * rank // 8), dense_rows)
    spans = zip(pairwise([*starts, vocab_size]), ranks)
    return [Level(start, end, level_rank, k if start >= anchored else 0) for (start, end), level_rank in spans]
