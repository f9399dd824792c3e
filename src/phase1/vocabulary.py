"""What a token table knows of its vocabulary: statistics of the training text, one row per token."""

from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """A stretch of rows of an HTT table that are made alike."""

    start: int
    end: int
    rank: int
    """ρ, coefficients of each row; 0 in the tail."""
    anchors: int
    """k, rows before `start` that each row is a weighted sum of, besides; one number for all levels that have any."""


class TokenVectors(NamedTuple):
    """What is known of every token, in the order of ids: a dense table starts there, and the HTT table starts near it."""

    log_frequency: np.ndarray
    """(V,) float32: log((count + 1) / (N + V))."""
    rows: np.ndarray
    """(V, m) float32 of mean square 1. Similar use, similar direction; random where never used."""


class TokenStatistics(NamedTuple):
    """All but `positions` are in the order of positions, not of ids."""

    positions: np.ndarray
    """(V,) int64: place of each id in the table, frequent ids first, rare ids of similar use side by side."""
    log_frequency: np.ndarray
    """(V,) float32: log((count + 1) / (N + V))."""
    rows: np.ndarray
    """(K, m) float32 of mean square 1: where the dense rows start. Similar use, similar direction; random where never used."""
    anchors: np.ndarray
    """(n, k) int64: the rows that each of the last n rows is a sum of, all before its level."""
    weights: np.ndarray
    """(n, k) float32: the weights of that sum at the start."""
    rest: np.ndarray
    """(V - K, m) float32: where the row starts besides that sum, as `rows`; 0 from column ρ on."""
