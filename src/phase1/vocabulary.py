"""What the HTT table knows of its vocabulary: statistics of the training text, one row per token."""

from typing import NamedTuple

import numpy as np


class TokenStatistics(NamedTuple):
    """All but `positions` are in the order of positions, not of ids."""

    positions: np.ndarray
    """(V,) int64: place of each id in the table, frequent ids first, rare ids of similar use side by side."""
    log_frequency: np.ndarray
    """(V,) float32: log((count + 1) / (N + V))."""
    groups: np.ndarray
    """(V,) int64 in [0, groups): tokens of similar use share a group."""
    rows: np.ndarray
    """(K, m) float32 of mean square 1: where the dense rows start. Similar use, similar direction; random where never used."""
    centroids: np.ndarray
    """(groups, m) float32: where the centroids start."""
    anchors: np.ndarray
    """(V - K, k) int64: the rows that each further row is a sum of, in [0, K) for the band and before the tail for the tail."""
    weights: np.ndarray
    """(V - K, k) float32: the weights of that sum at the start."""
