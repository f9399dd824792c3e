"""The median, how certain it is, and the interval of a paired perplexity ratio."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Bounds = tuple[float, float]


def _positive(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name} must be one or more finite numbers above 0; got {array.tolist()!r:.80}; measure again")
    return array


def median(samples: Sequence[float]) -> float:
    """The median of positive samples. Raises ValueError where there is none, or one is not finite and above 0."""
    return float(np.median(_positive("samples", samples)))


def relative_median_error(samples: Sequence[float]) -> float:
    """Standard error of the median, as a share of it: 1.2533 s / sqrt(n) / median, s from the interquartile range.

    s = IQR / 1.349, so that one hiccup among twenty steps does not set the noise of the other nineteen.
    """
    array = _positive("samples", samples)
    low, mid, high = np.quantile(array, [0.25, 0.5, 0.75])
    return float(1.2533 * (high - low) / 1.349 / np.sqrt(array.size) / mid)


def paired_ratio_interval(nll_a: ArrayLike, nll_b: ArrayLike, tokens: ArrayLike) -> tuple[float, Bounds | None]:
    """ppl(a) / ppl(b) - 1 in percent and its 95 % interval, from the summed losses of the same windows in text order.

    With d_i = nll_a_i - nll_b_i and n_i tokens in window i, the log ratio is theta = sum d / sum n, the ratio estimator, so a
    window counts by its tokens. Its residuals e_i = d_i - theta n_i give the variance m/(m-1) sum e_i^2 / (sum n)^2.
    Neighbouring windows are of one text and their e_i correlate, so the Newey-West sum over a few lags replaces sum e_i^2
    where it is larger. Student's t with m - 1 degrees of freedom; the interval of theta is carried through exp.

    Args:
        nll_a, nll_b: nats, summed over each window, (m,).
        tokens: targets of each window, (m,); windows without targets are left out.
    Returns:
        percent, (low, high); None in place of the interval for fewer than 2 windows.
    Raises:
        ValueError: shapes differ, a number is not finite, or there is no target at all.
    """
    a, b, n = (np.asarray(values, dtype=np.float64) for values in (nll_a, nll_b, tokens))
    if a.ndim != 1 or not a.shape == b.shape == n.shape:
        raise ValueError(f"nll_a, nll_b and tokens must share one shape (windows,); got {a.shape}, {b.shape} and {n.shape}")
    if not (np.isfinite(a) & np.isfinite(b) & np.isfinite(n) & (n >= 0)).all() or n.sum() <= 0:
        raise ValueError("losses must be finite and tokens 0 or more with one above 0; got others; evaluate again")
    scored = n > 0
    d, n = (a - b)[scored], n[scored]
    theta = float(d.sum() / n.sum())
    if d.size < 2:
        return _percent(theta), None
    squares = _sum_of_squares(d - theta * n) * d.size / (d.size - 1)
    half_width = float(stdtrit(d.size - 1, 0.975) * np.sqrt(squares) / n.sum())
    return _percent(theta), (_percent(theta - half_width), _percent(theta + half_width))


def _percent(log_ratio: float) -> float:
    """exp(log_ratio) - 1 in percent, finite whatever the models are like."""
    return float(100 * np.expm1(min(log_ratio, 500.0)))


def _sum_of_squares(e: NDArray[np.float64]) -> float:
    """sum e^2, or its Newey-West form sum_l w_l sum_i e_i e_{i+l} with Bartlett weights where that is larger."""
    plain = float(e @ e)
    lags = min(int(4 * (e.size / 100) ** (2 / 9)), e.size - 1)  # the usual rule of thumb: 4 lags at 100 windows
    correlated = plain + 2 * sum((1 - lag / (lags + 1)) * float(e[:-lag] @ e[lag:]) for lag in range(1, lags + 1))
    return max(plain, correlated)
