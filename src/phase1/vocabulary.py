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
    vectors: np.ndarray
    """(V, k) float32, rows of mean square 1: similar use, similar direction; random where a token never occurs."""
