import numpy as np
import pytest

from phase1.stats.perplexity_ratio import paired_ratio_interval
from phase1.stats.step_times import median, relative_median_error


def windows(rng, m, theta, correlation=0.0, noise=0.05):
    """Summed losses of two models whose true log perplexity ratio is theta, over windows of unequal length."""
    tokens = rng.integers(20, 513, m)
    e = rng.normal(size=m)
    for i in range(1, m):
        e[i] = correlation * e[i - 1] + np.sqrt(1 - correlation**2) * e[i]
    nll_b = 3.5 * tokens + rng.normal(size=m) * np.sqrt(tokens)
    return nll_b + theta * tokens + noise * e * tokens, nll_b, tokens


def test_the_ratio_is_that_of_the_perplexities_of_all_tokens():
    nll_a, nll_b, tokens = windows(np.random.default_rng(0), 50, 0.1)
    perplexities = [np.exp(nll.sum() / tokens.sum()) for nll in (nll_a, nll_b)]
    percent, (low, high) = paired_ratio_interval(nll_a, nll_b, tokens)
    assert percent == pytest.approx(100 * (perplexities[0] / perplexities[1] - 1), rel=1e-12)
    assert low < percent < high


@pytest.mark.parametrize("m", [5, 30, 200])
def test_the_interval_holds_the_true_ratio_in_95_of_100_evaluations_with_unequal_windows(m):
    rng = np.random.default_rng(1)
    truth = 100 * np.expm1(0.03)
    intervals = [paired_ratio_interval(*windows(rng, m, 0.03))[1] for _ in range(1000)]
    assert 0.93 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.975  # three standard errors are 2 %


def test_the_interval_is_wider_for_neighbouring_windows_that_agree():
    rng = np.random.default_rng(2)
    truth = 100 * np.expm1(0.03)
    intervals = [paired_ratio_interval(*windows(rng, 400, 0.03, correlation=0.4))[1] for _ in range(500)]
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.91  # 0.80 where the correlation is ignored


def articles(rng, m, mean_length, share):
    """Errors of m windows of articles of random length; windows of one article have `share` of their variance in common."""
    e = np.empty(0)
    while e.size < m:
        length = rng.geometric(1 / mean_length)
        e = np.append(e, np.sqrt(share) * rng.normal() + np.sqrt(1 - share) * rng.normal(size=length))
    return e[:m]


def test_the_interval_holds_the_true_ratio_where_windows_are_of_articles():
    """As in WikiText's validation text at T = 512: 488 windows, 60 articles; neighbours in measured losses correlate by 0.14."""
    rng = np.random.default_rng(9)
    truth, tokens = 100 * np.expm1(0.03), np.full(488, 512)
    tokens[-1] = 392
    held = 0
    for _ in range(500):
        difference = (0.03 + 0.05 * articles(rng, 488, mean_length=8, share=0.15)) * tokens
        low, high = paired_ratio_interval(3.5 * tokens + difference, 3.5 * tokens, tokens)[1]
        held += low <= truth <= high
    assert 0.91 <= held / 500 <= 0.975  # 0.83 by a Newey-West sum over a few lags


def test_a_window_counts_by_its_tokens():
    percent, _ = paired_ratio_interval([200.0, 1.0], [100.0, 1.0], [1000, 1])
    assert percent == pytest.approx(100 * np.expm1(100 / 1001))


def test_pairing_makes_the_interval_independent_of_how_hard_the_windows_are():
    rng = np.random.default_rng(3)
    tokens = np.full(100, 512)
    difference = rng.normal(10, 1, 100)
    easy, hard = np.full(100, 100.0), rng.uniform(10, 5000, 100)
    assert paired_ratio_interval(easy + difference, easy, tokens)[1] == pytest.approx(
        paired_ratio_interval(hard + difference, hard, tokens)[1]
    )


def test_a_ratio_that_is_the_same_in_every_window_has_no_width_however_unequal_the_windows():
    tokens = np.array([1, 10, 100, 512])
    percent, (low, high) = paired_ratio_interval(3.5 * tokens + 0.1 * tokens, 3.5 * tokens, tokens)
    assert low == pytest.approx(percent) and high == pytest.approx(percent)


def test_windows_without_targets_change_nothing():
    nll_a, nll_b, tokens = windows(np.random.default_rng(4), 20, 0.05)
    padded = [np.append(x, 0) for x in (nll_a, nll_b, tokens)]
    assert paired_ratio_interval(*padded) == paired_ratio_interval(nll_a, nll_b, tokens)


def test_one_window_gives_a_ratio_without_an_interval():
    percent, interval = paired_ratio_interval([11.0], [10.0], [10])
    assert percent == pytest.approx(100 * np.expm1(0.1))
    assert interval is None


def test_equal_losses_are_a_ratio_of_one_with_no_width():
    assert paired_ratio_interval([5.0, 6.0], [5.0, 6.0], [2, 3]) == (0.0, (0.0, 0.0))


def test_a_diverged_model_gives_a_finite_ratio():
    percent, (low, high) = paired_ratio_interval([1e6, 2e6], [1.0, 1.0], [10, 10])
    assert np.isfinite([percent, low, high]).all()


@pytest.mark.parametrize(
    "arguments",
    [([1.0], [1.0, 2.0], [1, 1]), ([], [], []), ([1.0], [1.0], [0]), ([np.nan], [1.0], [1]), ([1.0], [1.0], [-1])],
    ids=str,
)
def test_losses_that_are_no_losses_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        paired_ratio_interval(*arguments)


def test_the_error_of_a_median_is_its_spread_over_repeated_measurements():
    samples = 1 + 0.02 * np.random.default_rng(7).normal(size=(2000, 20))
    observed = np.median(samples, axis=1).std()
    assert np.mean([relative_median_error(row) for row in samples]) == pytest.approx(observed, rel=0.1)


def test_one_hiccup_does_not_set_the_error_of_a_median():
    steady = list(1 + 0.01 * np.random.default_rng(8).normal(size=19))
    assert relative_median_error([*steady, 50.0]) < 1.5 * relative_median_error([*steady, 1.0])


@pytest.mark.parametrize("samples", [[], [0.0], [1.0, -1.0], [np.nan], [[1.0]]], ids=str)
def test_samples_that_are_no_times_are_refused(samples):
    with pytest.raises(ValueError, match="samples must"):
        median(samples)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two():
    assert median([4.0, 1.0, 2.0, 100.0]) == 3.0
