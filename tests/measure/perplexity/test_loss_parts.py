import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1.measure.perplexity.evaluate import Evaluation
from phase1.measure.perplexity.loss_parts import loss_by_band, loss_by_position, order_sha256


def evaluation(losses, places=None):
    losses = np.asarray(losses)
    return Evaluation(losses, np.arange(len(losses)) if places is None else np.asarray(places), np.array([len(losses)]), None)


def test_positions_are_octaves_of_the_tokens_before_the_target():
    parts = loss_by_position(evaluation(np.arange(10.0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert [(p.first, p.last, p.tokens) for p in parts] == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 9, 2)]
    assert [p.avg_loss for p in parts] == [0, 1, 2.5, 5.5, 8.5]


@pytest.mark.parametrize("longest, last", [(0, (0, 0)), (1, (1, 1)), (511, (256, 511)), (512, (512, 512))])
def test_the_last_octave_ends_with_the_window(longest, last):
    parts = loss_by_position(evaluation(np.ones(longest + 1)))
    assert (parts[-1].first, parts[-1].last) == last and parts[0].first == 0


def test_a_sliding_window_has_no_target_with_short_context_past_its_first_window():
    parts = loss_by_position(evaluation(np.ones(8), [0, 1, 2, 3, 2, 3, 2, 3]))
    assert [(p.first, p.last, p.tokens) for p in parts] == [(0, 0, 1), (1, 1, 1), (2, 3, 6)]


def test_bands_are_by_rank_in_the_given_order():
    order = np.random.default_rng(0).permutation(20000)
    ranks = [0, 1023, 1024, 4095, 4096, 16383, 16384, 19999]
    parts = loss_by_band(evaluation(np.arange(8.0)), order[ranks].astype(np.uint16), order)
    assert [(p.first, p.last) for p in parts] == [(0, 1023), (1024, 4095), (4096, 16383), (16384, 19999)]
    assert [p.avg_loss for p in parts] == [0.5, 2.5, 4.5, 6.5]


def test_a_small_vocabulary_has_the_bands_it_reaches_and_empty_ones_are_left_out():
    parts = loss_by_band(evaluation([1.0, 3.0]), np.array([0, 1]), np.arange(5000))
    assert [(p.first, p.last, p.tokens, p.avg_loss) for p in parts] == [(0, 1023, 2, 2.0)]


@given(count=st.integers(1, 300), vocab=st.integers(1, 30000), seed=st.integers(0, 99), dtype=st.sampled_from(["f4", "f8"]))
@settings(deadline=None, max_examples=60)
def test_the_parts_sum_to_the_loss_of_the_text(count, vocab, seed, dtype):
    rng = np.random.default_rng(seed)
    result = evaluation(rng.exponential(5, count).astype(dtype), rng.integers(0, 600, count))
    targets = rng.integers(0, vocab, count)
    for parts in (loss_by_position(result), loss_by_band(result, targets, rng.permutation(vocab))):
        assert sum(p.tokens for p in parts) == count
        assert sum(p.tokens * p.avg_loss for p in parts) == pytest.approx(result.nll_nats.sum(), rel=1e-9)


def test_orders_are_told_apart_and_their_type_does_not_matter():
    order = np.arange(300)
    assert order_sha256(order) == order_sha256(order.astype(np.int32)) != order_sha256(order[::-1].copy())
