import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1.generation import Sampling


def brute_force(p, temperature, top_k, top_p):
    """{id: probability}, by the definition."""
    p = np.asarray(p, dtype=float) ** (1 / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    total = sum(p[i] for i in order)
    kept, have = [], 0.0
    for i in order:
        if top_p is not None and have >= top_p * (1 - 1e-12) and kept:
            break
        kept.append(i)
        have += p[i] / total
    return {i: p[i] / sum(p[j] for j in kept) for i in kept}


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1, 2, 3, 5, 8, 13]), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.sampled_from([0.05, 0.33, 0.77, 0.951]),
)
def test_what_is_left_and_how_likely_is_what_the_definition_says(weights, temperature, top_k, top_p):
    p = np.array(weights) / sum(weights)
    sampling = Sampling(temperature, top_k, top_p)
    left, ids = sampling.distribution(torch.from_numpy(np.log(p)))
    expected = brute_force(p, temperature, top_k, top_p)
    assert set(ids.tolist()) == set(expected)
    for i, share in zip(ids.tolist(), left.tolist()):
        assert share == pytest.approx(expected[i], rel=1e-9)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(1.0, 3), Sampling(1.0, None, 0.8)])
def test_the_share_of_chances_that_draw_a_token_is_its_probability(sampling):
    log_p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]).log()
    n = 20_000
    drawn = np.bincount([sampling.next_id(log_p, (i + 0.5) / n) for i in range(n)], minlength=5) / n
    p, ids = sampling.distribution(log_p)
    expected = np.zeros(5)
    expected[ids.numpy()] = p.numpy()
    assert drawn == pytest.approx(expected, abs=1.1e-4)


def test_temperature_0_takes_the_likeliest_and_of_equals_the_smaller_id():
    assert Sampling(0.0).next_id(torch.tensor([-3.0, -1.0, -1.0, -2.0]), 0.99) == 1


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
def test_no_chance_draws_a_token_without_probability(chance):
    log_p = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert Sampling().next_id(log_p, chance) == Sampling(1.0, 2).next_id(log_p, chance) == 1


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-300])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_smallest_temperatures_take_the_likeliest(temperature, cut):
    sampling = Sampling(temperature, **cut)
    assert {sampling.next_id(torch.tensor([-3.0, -1.0, -0.5, -torch.inf]), chance) for chance in (0.0, 0.5, 1 - 2**-53)} == {2}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"temperature": -1.0}, "--temperature must be 0 or more; got -1.0; raise it"),
        ({"temperature": float("nan")}, "--temperature must be a finite number; got nan; try 0.8"),
        ({"temperature": float("inf")}, "--temperature must be a finite number; got inf; try 0.8"),
        ({"top_k": 0}, "--top-k must be greater than 0; got 0; give a positive number, or leave it out"),
        ({"top_k": -1}, "--top-k must be greater than 0; got -1; give a positive number, or leave it out"),
        ({"top_p": 2.0}, "--top-p must be above 0 and at most 1; got 2.0; try 0.9"),
        ({"top_p": -1.0}, "--top-p must be above 0 and at most 1; got -1.0; try 0.9"),
        ({"top_p": float("nan")}, "--top-p must be above 0 and at most 1; got nan; try 0.9"),
    ],
)
def test_a_setting_out_of_range_is_refused_as_on_the_command_line(settings, says):
    with pytest.raises(ValueError) as raised:
        Sampling(**settings)
    assert str(raised.value) == says
