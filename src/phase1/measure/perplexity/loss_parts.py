"""The loss of a model by length of the context and by frequency of the target."""

from hashlib import sha256

import numpy as np

from phase1.measure.perplexity.evaluate import Evaluation
from phase1.records.schema import LossPart

BAND_STARTS = (0, 1024, 4096, 16384)  # ranks


def loss_by_position(evaluation: Evaluation) -> list[LossPart]:
    """Mean losses by the number of tokens before the target in its window, in octaves: 0, 1, 2-3, 4-7, ..."""
    end = int(evaluation.places.max()) + 1
    starts = [0, *(1 << i for i in range((end - 1).bit_length()))]
    return _parts(evaluation, evaluation.places, [*starts, end])


def loss_by_band(evaluation: Evaluation, targets: np.ndarray, order: np.ndarray) -> list[LossPart]:
    """Mean losses by frequency rank of the target: ranks from 0, 1024, 4096 and 16384 on.

    Args:
        targets: ids, in the order of the losses.
        order: (V,) all ids by falling frequency in the tokens of the training.
    """
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return _parts(evaluation, rank[targets], [*(start for start in BAND_STARTS if start < len(order)), len(order)])


def order_sha256(order: np.ndarray) -> str:
    """SHA-256 of the ids as little-endian uint32: equal for equal orders."""
    return sha256(order.astype("<u4").tobytes()).hexdigest()


def _parts(evaluation: Evaluation, values: np.ndarray, edges: list[int]) -> list[LossPart]:
    """One part for every interval between two edges that holds a target."""
    part = np.searchsorted(edges, values, side="right") - 1
    tokens = np.bincount(part, minlength=len(edges) - 1)
    sums = np.bincount(part, weights=evaluation.losses, minlength=len(edges) - 1)  # float64
    return [
        LossPart(first=edges[i], last=edges[i + 1] - 1, tokens=int(tokens[i]), avg_loss=float(sums[i] / tokens[i]))
        for i in np.flatnonzero(tokens)
    ]
