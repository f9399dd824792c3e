"""Curves that step times may follow over the sequence length, and how well they fit.

Noise is relative (a step that takes twice as long varies twice as much), so every fit but the plain line of `r_squared`
minimises RSS, the sum of squared relative residuals ((t - fit) / t)^2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import stdtrit

from phase1.records.schema import ComplexityOrder

Array = NDArray[np.float64]

FLAT_EXPONENT = 0.5  # between neighbouring lengths: below it the device waits for the host

CANDIDATES: dict[ComplexityOrder, Callable[[Array], Array]] = {
    "O(N)": lambda T: T,
    "O(N log N)": lambda T: T * np.log(T),
    "O(N^2)": lambda T: T**2,
}


def line(T: Array, t: Array) -> tuple[float, float]:
    """b and R^2 of the least-squares line t = a + b T; R^2 of constant times is 1, the line is exact."""
    x, y = T - T.mean(), t - t.mean()
    slope = float(x @ y / (x @ x))
    total = float(y @ y)
    return slope, 1 - float(np.sum((y - slope * x) ** 2)) / total if total > 0 else 1.0


def exponent(T: Array, t: Array) -> tuple[float, tuple[float, float]]:
    """Slope of log t against log T and its 95 % interval: the top three octaves, or the top three lengths."""
    top = max(3, int(np.sum(T[-1] / 8 <= T)))
    x, y = np.log(T[-top:]), np.log(t[-top:])
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    error = float(np.sqrt(np.sum((y - slope * x) ** 2) / (top - 2) / (x @ x)) * stdtrit(top - 2, 0.975))
    return slope, (slope - error, slope + error)


def fit(T: Array, t: Array, *terms: Callable[[Array], Array]) -> tuple[Array, float]:
    """The curve a + sum_k b_k terms_k(T), all coefficients >= 0, that minimises RSS; and its RSS."""
    parts = np.stack([np.ones_like(T), *(term(T) / term(T[-1:]) for term in terms)], axis=1)
    coefficients, norm = nnls(parts / t[:, None], np.ones_like(t))
    return parts * coefficients, norm**2  # (n, 1 + terms): what each part adds to the fitted time


@dataclass(frozen=True)
class Fits:
    """Every candidate, and the mixture t = a + b T + c T^2, fitted to the same times."""

    T: Array
    t: Array
    rss: dict[ComplexityOrder, float]
    curves: dict[ComplexityOrder, Array]
    mixture_rss: float
    share: float

    @property
    def order(self) -> ComplexityOrder:
        return min(self.rss, key=lambda order: self.rss[order])  # the first of equals, O(N): constant times fit all

    @property
    def misfit(self) -> float:
        """Root mean square residual of the best description, per degree of freedom."""
        n = self.T.size
        return float(np.sqrt(min(min(self.rss.values()) / (n - 2), self.mixture_rss / max(n - 3, 1))))


def fit_all(T: Array, t: Array) -> Fits:
    """Fit t with every candidate, and with a mixture of T and T^2."""
    rss, curves = {}, {}
    for order, term in CANDIDATES.items():
        parts, rss[order] = fit(T, t, term)
        curves[order] = parts.sum(axis=1)
    parts, mixture_rss = fit(T, t, CANDIDATES["O(N)"], CANDIDATES["O(N^2)"])
    return Fits(T, t, rss, curves, mixture_rss, float(parts[-1, 2] / parts[-1].sum()))


def flat_lengths(T: Array, t: Array) -> int:
    """How many of the shortest lengths are followed by one that takes hardly longer."""
    flat = np.log(t[1:] / t[:-1]) < FLAT_EXPONENT * np.log(T[1:] / T[:-1])
    return T.size - 1 if flat.all() else int(np.argmin(flat))


def linear_rss(fits: Fits, skipped: int) -> float:
    """RSS of the best linear description: the line, or max(h, a + b T) where the times began flat, the host taking h.

    A parabola follows the bend between the two better than a line does, and is not to be believed for that.
    """
    T, t, best = fits.T, fits.t, fits.rss["O(N)"]
    for k in range(1, T.size if skipped or flat_lengths(T, t) else 1):
        h = np.sum(1 / t[:k]) / np.sum(1 / t[:k] ** 2)
        parts = np.stack([np.ones_like(T), T / T[-1]], axis=1)
        coefficients, _ = nnls(parts[k:] / t[k:, None], np.ones(T.size - k))
        best = min(best, float(np.sum((np.maximum(h, parts @ coefficients) / t - 1) ** 2)))
    return best
