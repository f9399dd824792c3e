import numpy as np
import pytest

from phase1.records.schema import DecodePoint
from phase1.stats.decoding import DECODE_SPEED_LIMIT, judge


def point(context, milliseconds, noise=0.01, rounds=20, seed=0):
    times = milliseconds * np.exp(noise * np.random.default_rng([seed, context]).standard_normal(rounds))
    return DecodePoint(
        context=context,
        prefill_tokens_per_second=1.0,
        decode_tokens_per_second=1.0,
        state_bytes=1,
        step_times_ms=times.tolist(),
    )


@pytest.mark.parametrize(
    "slower, noise, verdict",
    [
        (1.0, 0.01, "constant"),
        (1.02, 0.01, "constant"),
        (1.2, 0.01, "not constant"),
        (3.0, 0.3, "not constant"),
        (1 / DECODE_SPEED_LIMIT, 0.02, "inconclusive"),
        (1.0, 0.5, "inconclusive"),  # too noisy to see growth is not constant
    ],
)
def test_the_verdict(slower, noise, verdict):
    made = judge([point(8192, slower, noise), point(1024, 1.0, noise)])
    assert made.verdict == verdict and [p.context for p in made.points] == [1024, 8192]
    low, high = made.speed_ratio_ci95
    assert low <= made.speed_ratio <= high and (made.detail == "") == (verdict != "inconclusive")


@pytest.mark.parametrize(
    "points, says",
    [
        ([point(1024, 1.0), point(4096, 1.0)], "must span 8x"),
        ([point(1, 1.0, rounds=4), point(9, 1.0, rounds=4)], "fewer than 5 rounds"),
    ],
)
def test_too_little_gives_no_verdict(points, says):
    made = judge(points)
    assert made.verdict == "inconclusive" and says in made.detail


def test_a_true_ratio_below_the_limit_is_seldom_called_constant():
    wrong = sum(
        judge([point(1, 1.0, 0.03, seed=i), point(8, 1 / 0.94, 0.03, seed=i)]).verdict == "constant" for i in range(300)
    )
    assert wrong <= 15
