import numpy as np
import pytest

from phase1.stats.step_times import drifts, median_interval, reaches, speed_ratio
from tests.stats.noise import NOISE, OWN_AR


def coverage(noise, n, draws=600, seed=1):
    rng = np.random.default_rng(seed)
    intervals = [speed_ratio(*np.exp(noise(rng, n)))[1] for _ in range(draws)]
    return np.mean([low <= 1 <= high for low, high in intervals])


@pytest.mark.parametrize("rounds", [9, 20, 40])
@pytest.mark.parametrize("kind", NOISE)
def test_the_interval_of_a_ratio_holds_the_truth_in_93_to_98_of_100_runs(kind, rounds):
    # 95.5 to 97.8 in 3,000 draws of each; three standard errors of 600 draws are 2.4 %
    assert 0.935 <= coverage(NOISE[kind], rounds) <= 0.99


def test_noise_that_lasts_over_rounds_is_allowed_for_as_far_as_20_rounds_tell():
    assert coverage(OWN_AR[0.3], 20) >= 0.91  # 93.8 % in 1,500 draws, 85 % without the allowance
    assert coverage(OWN_AR[0.6], 20) >= 0.88  # 91.5 %, 68 % without


@pytest.mark.parametrize("rounds", [5, 6])
def test_five_rounds_are_enough_for_an_interval(rounds):
    assert coverage(NOISE["independent"], rounds, draws=1000) >= 0.92  # the least and the greatest of 5 hold it in 93.75 %


def test_noise_of_a_whole_round_does_not_widen_the_interval():
    rng = np.random.default_rng(2)
    a, b = np.exp(0.02 * rng.normal(size=(2, 20)))
    clock = np.exp(np.cumsum(0.1 * rng.normal(size=20)))
    assert speed_ratio(a * clock, b * clock)[1] == pytest.approx(speed_ratio(a, b)[1], rel=1e-12)


def test_twice_the_time_is_half_the_speed_and_a_model_against_itself_is_1():
    times = np.exp(0.1 * np.random.default_rng(3).normal(size=20))
    assert speed_ratio(2 * times, times)[1] == pytest.approx((0.5, 0.5))
    assert speed_ratio(times, times) == (1.0, (1.0, 1.0))


def test_exchanging_the_models_inverts_ratio_and_interval():
    a, b = np.exp(0.05 * np.random.default_rng(4).normal(size=(2, 15)))
    ratio, (low, high) = speed_ratio(a, b)
    assert speed_ratio(b, a) == (pytest.approx(1 / ratio), pytest.approx((1 / high, 1 / low)))


def test_one_hiccup_hardly_moves_the_ratio():
    a, b = np.exp(0.02 * np.random.default_rng(5).normal(size=(2, 20)))
    hiccup = a.copy()
    hiccup[7] *= 10
    assert speed_ratio(hiccup, b)[0] == pytest.approx(speed_ratio(a, b)[0], rel=0.01)
    assert speed_ratio(hiccup, b)[1][0] > 0.95 * speed_ratio(a, b)[1][0]


def test_a_higher_level_is_a_wider_interval():
    a, b = np.exp(0.05 * np.random.default_rng(6).normal(size=(2, 20)))
    (_, (l95, h95)), (_, (l99, h99)) = speed_ratio(a, b), speed_ratio(a, b, 0.99)
    assert l99 < l95 < h95 < h99


def test_fewer_than_five_rounds_give_a_ratio_without_an_interval():
    assert speed_ratio([2.0] * 4, [1.0] * 4) == (0.5, None)
    assert median_interval([1.0] * 4) is None


@pytest.mark.parametrize(
    "pair", [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [np.nan]), ([[1.0]], [[1.0]])], ids=str
)
def test_times_that_are_no_pairs_are_refused(pair):
    with pytest.raises(ValueError, match="same rounds"):
        speed_ratio(*pair)


@pytest.mark.parametrize("rounds", [9, 20])
def test_the_interval_of_a_median_holds_it(rounds):
    rng = np.random.default_rng(7)
    held = []
    for _ in range(1500):
        low, high = median_interval(np.exp(0.1 * rng.normal(size=rounds)))
        held.append(low <= 1 <= high)
    assert 0.945 <= np.mean(held) <= 0.99


def test_the_interval_of_a_median_is_made_of_samples_and_holds_the_middle_two():
    x = np.random.default_rng(8).permutation(20) + 1.0
    low, high = median_interval(x)
    assert {low, high} <= set(x) and low <= 10 and high >= 11


def test_a_level_is_reached_by_enough_rounds():
    assert not reaches(0.95, 5) and reaches(0.95, 6)
    assert not reaches(1 - 0.05 / 4, 7) and reaches(1 - 0.05 / 4, 8)


def test_a_drift_is_the_change_between_the_halves_and_noise_seldom_is_one():
    rng = np.random.default_rng(9)
    assert drifts(np.exp(0.02 * rng.normal(size=20)) * np.repeat([1, 1.2], 10), 0.05) == pytest.approx(0.2, abs=0.05)
    assert drifts([1.0, 2.0, 3.0], 0.05) == 0, "three samples say nothing"
    assert drifts([1.0] * 10 + [1.04] * 10, 0.05) == 0, "within the limit"
    alarms = [drifts(np.exp(0.1 * rng.normal(size=20)), 0.05) != 0 for _ in range(1000)]
    assert np.mean(alarms) <= 0.02
