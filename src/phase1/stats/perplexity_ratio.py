"""The ratio of two perplexities on the same windows, and its interval."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import dct
from scipy.special import stdtrit

from phase1.stats import Bounds


def paired_ratio_interval(nll_a: ArrayLike, nll_b: ArrayLike, tokens: ArrayLike) -> tuple[float, Bounds | None]:
    """ppl(a) / ppl(b) - 1 in percent and its 95 % interval, from the summed losses of the same windows in text order.

    With d_i = nll_a_i - nll_b_i and n_i tokens in window i, the log ratio is theta = sum d / sum n, the ratio estimator, so a
    window counts by its tokens. Its residuals are e_i = d_i - theta n_i. Windows of one article correlate, over as many
    windows as it is long, so the variance of theta is m w / (sum n)^2 with the long-run variance w of e from its nu lowest
    cosine sums, and Student's t has nu degrees of freedom. The interval of theta is carried through exp.
    Source: Lazarus, Lewis, Stock and Watson 2018, "HAR Inference: Recommendations for Practice", the EWC estimator.

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
    variance, freedom = _long_run_variance(d - theta * n)
    half_width = float(stdtrit(freedom, 0.975) * np.sqrt(d.size * variance) / n.sum())
    return _percent(theta), (_percent(theta - half_width), _percent(theta + half_width))


def _percent(log_ratio: float) -> float:
    """exp(log_ratio) - 1 in percent, finite whatever the models are like."""
    return float(100 * np.expm1(min(log_ratio, 500.0)))


def _long_run_variance(e: NDArray[np.float64]) -> tuple[float, int]:
    """w = mean over j = 1..nu of (sqrt(2/m) sum_i e_i cos(pi j (i + 1/2) / m))^2, and nu = 0.4 m^(2/3), at least 4.

    The lowest frequencies only: what correlates over fewer than m / nu windows is in w like the rest.
    """
    m = e.size
    nu = min(m - 1, max(4, int(0.4 * m ** (2 / 3))))
    sums = dct(e, type=2)[1 : nu + 1] / 2
    return float(np.mean(2 / m * sums**2)), nu
