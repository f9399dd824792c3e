"""Step times: their median, and the speed ratio of two models that took their steps in the same rounds, with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from phase1.records.schema import Measurement
from phase1.stats import Bounds

Array = NDArray[np.float64]

MIN_ROUNDS = 5  # the widest interval, from the least to the greatest of 5, holds the median in 93.75 % of cases
UNSTABLE = 0.10  # relative interquartile range of the steps of one length
MAX_AUTOCORRELATION = 0.8  # a larger estimate from so few numbers is not credible


def median_interval(samples: ArrayLike, level: float = 0.95) -> Bounds | None:
    """Interval of the median of step times in the order they were taken: between two of them, counted from the middle.

    The k-th smallest and the k-th greatest, k = (n + 1)/2 - f z sqrt(n)/2: the sign test, whatever the distribution. f >= 1
    widens it where a step resembles the one before (`_inflation`). None for fewer than 5 samples.
    """
    x = np.asarray(samples, dtype=np.float64)
    if x.size < MIN_ROUNDS:
        return None
    return _middle(np.sort(x), np.sqrt(x.size) / 2 * _inflation(x), level)


def speed_ratio(times: ArrayLike, baseline_times: ArrayLike, level: float = 0.95) -> tuple[float, Bounds | None]:
    """How many times as fast as the baseline, and the interval of that, from the step times of the same rounds.

    With d_i = log(baseline_i / time_i) of round i: exp of the Hodges-Lehmann estimate, the median of all (d_i + d_j)/2, and
    of the interval that Wilcoxon's signed-rank test leaves standing, widened where rounds resemble the ones before. What
    slows down a whole round, such as a falling clock, is not in d at all. Coverage by kind of noise: docs/design.md.

    Args:
        times, baseline_times: of one step each, positive, in the order of the rounds, (n,), in one unit.
        level: the interval's coverage. It ends at the least and greatest d_i, which hold the truth with 1 - 2^(1 - n).
    Returns:
        ratio, (low, high); None in place of the interval for fewer than 5 rounds.
    Raises:
        ValueError: the rounds are not the same number of positive times, or there is none.
    """
    a, b = np.asarray(times, dtype=np.float64), np.asarray(baseline_times, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size or not (np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)).all():
        raise ValueError(f"expected the positive times of the same rounds; got {a.size} and {b.size}; measure again")
    d = np.log(b / a)
    n = d.size
    i, j = np.triu_indices(n)
    averages = np.sort((d[i] + d[j]) / 2)
    ratio = float(np.exp(np.median(averages)))
    if n < MIN_ROUNDS:
        return ratio, None
    low, high = _middle(averages, np.sqrt(n * (n + 1) * (2 * n + 1) / 24) * _inflation(d), level)
    return ratio, (float(np.exp(low)), float(np.exp(high)))


def reaches(level: float, rounds: int) -> bool:
    """Whether so few rounds can give an interval of `speed_ratio` of that level at all."""
    return rounds >= MIN_ROUNDS and 2.0 ** (1 - rounds) <= 1 - level


def _middle(ascending: Array, spread: float, level: float) -> Bounds:
    """The two of `ascending` that lie z(level) * spread places from its middle, or its ends."""
    places = float(ndtri((1 + level) / 2)) * spread
    k = max(int(np.floor((ascending.size + 1) / 2 - places)), 1)
    return float(ascending[k - 1]), float(ascending[-k])


def _inflation(x: Array) -> float:
    """The factor by which autocorrelation of neighbours widens an interval: sqrt((1 + r) / (1 - r)), as for AR(1) noise.

    r is the lag-1 autocorrelation of the ranks, plus the (1 + 3r)/n by which so few numbers underestimate it.
    """
    ranks = np.sign(x[:, None] - x).sum(axis=1)  # centred; equal numbers share one
    total = ranks @ ranks
    if not total:
        return 1.0
    r = float(ranks[1:] @ ranks[:-1] / total)
    r = min(max(r + (1 + 3 * r) / x.size, 0.0), MAX_AUTOCORRELATION)
    return float(np.sqrt((1 + r) / (1 - r)))


def drifts(samples: Sequence[float], limit: float, alpha: float = 0.01) -> float:
    """Change of the median from the first to the second half, as a share; 0 if within `limit` or not significant.

    Significant: by the rank sum of the second half, normal approximation, two-sided.
    """
    x = np.asarray(samples, dtype=np.float64)
    n = x.size // 2
    if n < MIN_ROUNDS:
        return 0.0
    first, second = x[:n], x[-n:]
    change = float(np.median(second) / np.median(first) - 1)
    z = np.sign(second[:, None] - first).sum() / 2 / np.sqrt(n * n * (2 * n + 1) / 12)
    return change if abs(change) > limit and abs(z) > ndtri(1 - alpha / 2) else 0.0


def _positive(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name} must be one or more finite numbers above 0; got {array.tolist()!r:.80}; measure again")
    return array


def median(samples: Sequence[float]) -> float:
    """The median of positive samples. Raises ValueError where there is none, or one is not finite and above 0."""
    return float(np.median(_positive("samples", samples)))


def spread(samples: Sequence[float]) -> float:
    """Relative interquartile range: of the middle half of the samples, as a share of the median; 0 of too few."""
    if len(samples) < MIN_ROUNDS:
        return 0.0
    low, mid, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float((high - low) / mid)


def relative_median_error(samples: Sequence[float]) -> float:
    """Standard error of the median, as a share of it: 1.2533 s / sqrt(n) / median, s from the interquartile range.

    s = IQR / 1.349, so that one hiccup among twenty steps does not set the noise of the other nineteen.
    """
    array = _positive("samples", samples)
    low, mid, high = np.quantile(array, [0.25, 0.5, 0.75])
    return float(1.2533 * (high - low) / 1.349 / np.sqrt(array.size) / mid)


def with_ratios(measurements: Sequence[Measurement], baseline: Sequence[Measurement]) -> list[Measurement]:
    """`measurements` with ratio and interval wherever the baseline took its steps in the same rounds."""
    found = []
    for m in measurements:
        if pair := rounds_of(m, baseline):
            ratio, interval = speed_ratio(*pair)
            m = m.model_copy(update={"ratio_to_baseline": ratio, "ratio_ci95": None if m in baseline else interval})
        found.append(m)
    return found


def with_fastest(measurements: Sequence[Measurement], rivals: Mapping[str, Sequence[Measurement]]) -> list[Measurement]:
    """`measurements` with the ratio to the fastest of `rivals` at the same length and batch size, wherever one ran."""
    found = []
    for m in measurements:
        speeds = {
            name: other.tokens_per_second
            for name, others in rivals.items()
            for other in others
            if (other.seq_length, other.batch_size) == (m.seq_length, m.batch_size) and other.tokens_per_second is not None
        }
        fastest = max(speeds, key=lambda name: speeds[name], default=None)
        if fastest is not None and (pair := rounds_of(m, rivals[fastest])):
            ratio, interval = speed_ratio(*pair)
            own = pair[0] is pair[1]  # no interval of a model against itself
            update = {"fastest": fastest, "ratio_to_fastest": ratio, "ratio_to_fastest_ci95": None if own else interval}
            m = m.model_copy(update=update)
        found.append(m)
    return found


def rounds_of(m: Measurement, others: Sequence[Measurement]) -> tuple[list[float], list[float]] | None:
    """Step times of `m`, and those of the same rounds in `others`; None where there are none."""
    for other in others:
        if (other.seq_length, other.batch_size) == (m.seq_length, m.batch_size):
            same = m.step_times_ms and len(m.step_times_ms) == len(other.step_times_ms)
            return (m.step_times_ms, other.step_times_ms) if same else None
    return None
