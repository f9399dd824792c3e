"""Is step time linear in the sequence length? A verdict that admits when the data cannot tell."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import chdtri, chndtr, fdtrc, ndtr

from phase1.records.schema import ComplexityOrder, Scaling, Verdict
from phase1.stats.curves import CANDIDATES, FLAT_EXPONENT, Array, Fits, exponent, fit, fit_all, flat_lengths, line, linear_rss
from phase1.stats.step_times import relative_median_error

MIN_LENGTHS, MIN_SPAN = 4, 8  # below these there is no verdict
QUADRATIC_SHARE_LIMIT = 0.15
NOISE = 0.02  # relative standard deviation of a time, assumed if there are no raw samples to estimate it from
NOISE_FLOOR = 0.002  # least noise of any time: clocks and temperatures drift by this much between lengths
MIN_SAMPLES = 5  # steps of a length that are needed to estimate the noise of its median
GROWTH_FLOOR = 0.01  # least misfit of any law: caches and waves of blocks bend a line by 1 to 8 %
NOISE_WEIGHT = 4  # residuals that the assumed noise is worth when residuals are few
MISFIT = 0.05  # a candidate that misses by more than this, root mean square, does not describe the times
WIDE_INTERVAL = 0.5  # width of the 95 % interval of the exponent
STEEP_EXPONENT = 1.25  # T log T stays below: its exponent is 1 + 1 / ln T
STEEP_ERRORS = 3.3  # standard errors that the exponent of the last two lengths must lie above that; p = 0.0005
ALPHA = 0.005  # significance level of each test that another candidate is better
CLOSE, AHEAD = 0.007, 0.003  # significance levels of the two tests that refute a candidate, together the specified 1 %

_REMEDY = "add longer lengths, or measure more steps on an idle machine"


def fit_scaling(lengths: Sequence[int], seconds: Sequence[float], samples: Sequence[Sequence[float]] | None = None) -> Scaling:
    """Fit step time t against sequence length T and judge whether it is linear.

    - `r_squared`, `scaling_coefficient`: of the least-squares line t = a + b T over all lengths.
    - `complexity_order`: the best of t = a + b f(T), a and b >= 0, f = T, T log T, T^2, by RSS.
    - `quadratic_share`: c T^2 / t at the longest T, of t = a + b T + c T^2 with a, b, c >= 0.
    - `exponent`: slope of log t against log T over the top three octaves, with its Student interval.

    linear: T is the best candidate, the share is at most 15 %, and T log T and T^2 are refuted: if one of them were true, times
    as linear as these would come up once in a hundred measurements. not linear: another candidate is significantly better, or
    the share is significantly above the limit, or the exponent, of the top octaves or of the last two lengths, is above 1.25
    for certain. Else inconclusive; `detail` says why and what to do. Where the device waits for the host, times are flat and
    follow no candidate: such lengths are left out of candidates, share and verdict while nothing fits to 5 % and enough
    lengths remain; `detail` says so. Where they stay in, another candidate has to be better than max(h, a + b T) too.

    Args:
        lengths: T, tokens, (n,), distinct, in any order.
        seconds: t of one step, a median, (n,).
        samples: raw step times per length, in any unit: how noisy the medians are. Without them, or with
            fewer than 5 of a length, 2 % is assumed.
    Raises:
        ValueError: shapes differ, a number is not positive and finite, or a length is there twice.
    """
    T, t = _checked(lengths, seconds)
    if samples is not None and len(samples) != T.size:
        raise ValueError(f"samples must hold one list per length, {T.size}; got {len(samples)}; measure again")
    if T.size < 3:
        return Scaling(verdict="inconclusive", detail=_too_short(T))
    noise = None
    if samples is not None and min(len(s) for s in samples) >= MIN_SAMPLES:
        noise = max(NOISE_FLOOR, float(np.sqrt(np.mean([relative_median_error(s) ** 2 for s in samples]))))
    slope, r_squared = line(T, t)
    slope_of_logs, interval = exponent(T, t)
    fits = _saturated(T, t)
    skipped = T.size - fits.T.size
    verdict, detail = _judge(fits, noise, interval, skipped)
    if skipped:
        detail += f"; the {skipped} shortest left out of the verdict: with them the times follow no candidate"
    return Scaling(
        complexity_order=fits.order,
        r_squared=r_squared,
        scaling_coefficient=slope,
        exponent=slope_of_logs,
        exponent_ci95=interval,
        quadratic_share=fits.share,
        verdict=verdict,
        detail=detail,
    )


def _checked(lengths: ArrayLike, seconds: ArrayLike) -> tuple[Array, Array]:
    T, t = np.asarray(lengths, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if T.ndim != 1 or T.shape != t.shape:
        raise ValueError(f"lengths and seconds must share one shape (n,); got {T.shape} and {t.shape}; measure again")
    if not (np.isfinite(T) & np.isfinite(t) & (T > 0) & (t > 0)).all() or np.unique(T).size != T.size:
        got = f"{T.tolist()} and {t.tolist()}"
        raise ValueError(f"lengths must be distinct, lengths and times above 0; got {got}; measure again")
    ascending = np.argsort(T)
    return T[ascending], t[ascending]


def _too_short(T: Array) -> str:
    """Why these lengths cannot decide; empty if they can."""
    if T.size < MIN_LENGTHS:
        return f"{T.size} lengths measured, a verdict needs {MIN_LENGTHS}: {deciding_lengths(T)}"
    if T[-1] < MIN_SPAN * T[0]:
        return f"lengths span {T[-1] / T[0]:.3g}x, a verdict needs {MIN_SPAN}x: {deciding_lengths(T)}"
    return ""


def enough_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """`lengths` in order, and by doubling the last as many more as a verdict needs."""
    wanted = sorted(set(lengths))
    while len(wanted) < MIN_LENGTHS or wanted[-1] < MIN_SPAN * wanted[0]:
        wanted.append(2 * wanted[-1])
    return tuple(wanted)


def deciding_lengths(lengths: ArrayLike) -> str:
    """Which further lengths would allow a verdict: the next ones by doubling, and by halving where one is enough."""
    given = sorted(int(length) for length in np.asarray(lengths, dtype=np.float64))
    if not given:
        return "give smaller --seq-lengths"
    wanted = enough_lengths(given)
    longer = f"--seq-lengths {' '.join(map(str, wanted))}"
    shorter = [given[0] // 2, *given]
    if len(shorter) < MIN_LENGTHS or shorter[-1] < MIN_SPAN * shorter[0] or given[0] < 2:
        return f"add T = {', '.join(f'{length:,}' for length in wanted[len(given) :])} ({longer})"
    return f"add T = {shorter[0]:,} or {wanted[-1]:,} (--seq-lengths {' '.join(map(str, shorter))}, or {longer})"


def _saturated(T: Array, t: Array) -> Fits:
    """Fits to all lengths, or to all but the shortest flat ones where only then something fits; to all where nothing does."""
    everything = fits = fit_all(T, t)
    while fits.misfit > MISFIT:
        flat = np.log(t[1] / t[0]) < FLAT_EXPONENT * np.log(T[1] / T[0])
        T, t = T[1:], t[1:]
        if not flat or _too_short(T):
            return everything
        fits = fit_all(T, t)
    return fits


def _judge(fits: Fits, noise: float | None, exponent: tuple[float, float], skipped: int) -> tuple[Verdict, str]:
    """The verdict and its reason; see `fit_scaling`."""
    n, line_rss, rival_rss = fits.T.size, fits.rss["O(N)"], linear_rss(fits, skipped)
    if short := _too_short(fits.T):
        return "inconclusive", short
    if exponent[0] > STEEP_EXPONENT:
        return "not linear", f"the exponent is at least {exponent[0]:.2f}"
    if (steep := _steep_end(fits, noise)) > STEEP_EXPONENT:
        return "not linear", f"the exponent between the two longest is at least {steep:.2f}"
    remedy = _remedy(fits.T, fits.t)
    if flat_lengths(fits.T, fits.t) == n - 1:
        return "inconclusive", f"the times hardly grow with T; {remedy}"
    if fits.misfit > MISFIT:
        return "inconclusive", f"no candidate describes the times to {MISFIT:.0%}; {remedy}"
    if _better(fits.rss[fits.order], n - 2, rival_rss, noise):
        return "not linear", f"{fits.order} describes the times significantly better than O(N)"
    if fits.share > QUADRATIC_SHARE_LIMIT and _better(fits.mixture_rss, n - 3, rival_rss, noise):
        return "not linear", f"a quadratic term of {fits.share:.0%} of the longest step, limit {QUADRATIC_SHARE_LIMIT:.0%}"
    if fits.share > QUADRATIC_SHARE_LIMIT:
        return "inconclusive", f"a quadratic term of {fits.share:.0%} cannot be excluded; {remedy}"
    if fits.order != "O(N)":
        return "inconclusive", f"{fits.order} describes the times better than O(N), but not significantly; {remedy}"
    if exponent[1] - exponent[0] > WIDE_INTERVAL:
        return "inconclusive", f"the interval of the exponent is wide ({exponent[0]:.2f} to {exponent[1]:.2f}); {remedy}"
    spread = NOISE if noise is None else max(noise, float(np.sqrt(line_rss / (n - 2))))
    if line_rss > chdtri(n - 2, 0.001) * spread**2:
        return "inconclusive", f"the times scatter by more than {spread:.0%} around the line; {remedy}"
    for order in ("O(N log N)", "O(N^2)"):
        if not _refuted(fits, order, spread):
            return "inconclusive", f"{order} cannot be told from O(N) with these lengths and noise; {remedy}"
    return "linear", f"O(N log N) and O(N^2) refuted; quadratic term {fits.share:.1%} of the longest step"


def _steep_end(fits: Fits, noise: float | None) -> float:
    """Lower end of the exponent between the two longest lengths; 0 where the noise is not known.

    No host-bound and then linear time max(h, a + b T), a >= 0, grows faster than T anywhere, however many lengths are flat.
    """
    if noise is None:
        return 0.0
    growth = float(np.log(fits.t[-1] / fits.t[-2])) - STEEP_ERRORS * np.sqrt(2) * max(noise, NOISE)
    return growth / float(np.log(fits.T[-1] / fits.T[-2]))


def _remedy(T: Array, t: Array) -> str:
    """What would decide; where the times are flat at first, from which length on to measure."""
    hidden = flat_lengths(T, t)
    start = int(T[hidden])
    if not hidden or start * MIN_SPAN <= T[-1]:  # enough lengths past the bend: they scatter
        return _REMEDY
    lengths = " ".join(str(start * 2**i) for i in range(MIN_LENGTHS))
    return (
        f"up to T = {start:,} a cost that does not depend on T hides the rest, on a GPU mostly the host launching operators: "
        f"use --cuda-graphs or --compile, or --seq-lengths {lengths}"
    )


def _better(rss: float, freedom: int, line_rss: float, noise: float | None) -> bool:
    """Whether a description with `rss` fits significantly better than the line.

    F tests with the noise of its own residuals, which hold for any noise, and with that noise pooled with the known or
    assumed one, which are strong when residuals are few. Neither noise is taken for less than GROWTH_FLOOR: on a quiet
    machine every bend of a linear kernel would be significant.
    """
    own = max(rss / freedom, GROWTH_FLOOR**2)
    pooled = (rss + NOISE_WEIGHT * max(noise or NOISE, GROWTH_FLOOR) ** 2) / (freedom + NOISE_WEIGHT)
    tests = ((own, freedom), (pooled, freedom + NOISE_WEIGHT))
    return any(fdtrc(1, df, max(line_rss - rss, 0) / variance) <= ALPHA for variance, df in tests)


def _refuted(fits: Fits, alternative: ComplexityOrder, noise: float) -> bool:
    """Would the alternative, were it true with this noise, give times as linear as these once in a hundred times at most?

    With lam the squared distance of the alternative's curve to the nearest line over noise^2: the line's RSS / noise^2 is
    noncentral chi-square(n - 2, lam), the lead of the line over the alternative is normal(-lam, 4 lam).
    """
    line_rss = fits.rss["O(N)"]
    _, distance = fit(fits.T, fits.curves[alternative], CANDIDATES["O(N)"])
    lam = distance / noise**2  # above 0: times that hardly grow, which a constant fits, are judged before
    lead = (fits.rss[alternative] - line_rss) / noise**2
    close = chndtr(line_rss / noise**2, fits.T.size - 2, lam)
    ahead = ndtr(-(lead + lam) / (2 * np.sqrt(lam)))
    return bool(close <= CLOSE or ahead <= AHEAD)
