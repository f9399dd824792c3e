import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1.config import Ranked, model_config
from phase1.measure.perplexity import Evaluation, Protocol, evaluate, unigram_entropy, windows
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE

TINY = Ranked(
    vocab_size=50, d_model=16, n_layers=1, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
    htt_rank=3, htt_dense_rows=10, htt_groups=6,
)  # fmt: skip


def protocol(seq_length=8, max_windows=None, **changes):
    sizes = {"seq_length": seq_length, "max_windows": max_windows}
    return Protocol(**({"dataset_sha256": "d", "tokenizer_sha256": "t", "split": "valid", "prefix": 49} | sizes | changes))


def model(role="phase1"):
    torch.manual_seed(0)
    return LanguageModel(model_config(role, TINY)).double()


def text(length=101):
    return np.random.default_rng(0).integers(0, 49, length).astype(np.uint16)


@given(length=st.integers(1, 60), seq_length=st.integers(1, 20))
@settings(deadline=None)
def test_every_token_is_a_target_once_and_follows_the_token_before_it(length, seq_length):
    ids = np.arange(length) + 1000
    inputs, targets = windows(ids, protocol(seq_length))
    scored = targets != IGNORE
    assert targets[scored].tolist() == ids.tolist()
    assert inputs[scored].tolist() == [49, *ids[:-1].tolist()]
    assert not scored.flatten()[length:].any()


def test_max_windows_scores_the_beginning_of_the_text():
    _, targets = windows(text(101), protocol(8, max_windows=3))
    assert targets.flatten().tolist() == text(101)[:24].tolist()


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_the_batch_size_does_not_change_the_result(role):
    results = [evaluate(model(role), text(), protocol(), batch_size=size, dtype=torch.float32) for size in (1, 3, 100)]
    for other in results[1:]:
        np.testing.assert_allclose(
            other.nll_nats, results[0].nll_nats, rtol=1e-6
        )  # nll sums are float64; losses at least float32


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_a_uniform_model_has_the_perplexity_of_the_vocabulary(role):
    net = model(role)
    with torch.no_grad():
        net.norm.weight.zero_()  # all logits 0
    result = evaluate(net, text(), protocol(), batch_size=4, dtype=torch.float32)
    assert result.perplexity == pytest.approx(50, rel=1e-9)
    assert result.tokens.sum() == 101


def test_losses_are_those_of_the_logits_window_by_window():
    net, ids = model(), text()
    result = evaluate(net, ids, protocol(), batch_size=4, dtype=torch.float32)
    inputs = torch.tensor([[49, *ids[:7].tolist()], ids[7:15].tolist()])
    expected = torch.nn.functional.cross_entropy(
        net(inputs).transpose(1, 2), torch.tensor(ids[:16].astype(np.int64)).view(2, 8), reduction="none"
    ).sum(1)
    np.testing.assert_allclose(result.nll_nats[:2], expected.detach().numpy(), rtol=1e-6)


def test_evaluation_leaves_the_training_mode_as_it_was():
    net = model().train()
    evaluate(net, text(), protocol(), batch_size=4, dtype=torch.float32)
    assert net.training


def test_bits_per_byte_and_word_perplexity_follow_their_formulas():
    result = Evaluation(np.array([6.0, 4.0]), np.array([3, 2]), None)
    assert result.loss == 2.0 and result.perplexity == pytest.approx(math.e**2)
    assert result.bits_per_byte(20) == pytest.approx(10 / math.log(2) / 20)
    assert result.word_perplexity(4) == pytest.approx(math.exp(2.5))


@pytest.mark.parametrize(
    "change", [{"seq_length": 9}, {"max_windows": 1}, {"prefix": 0}, {"dataset_sha256": "e"}, {"tokenizer_sha256": "u"}]
)
def test_every_part_of_the_protocol_is_in_its_hash(change):
    assert protocol().protocol_hash == protocol().protocol_hash != protocol(**change).protocol_hash


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        windows(text(0), protocol())


def test_unigram_entropy_of_a_uniform_text_is_the_logarithm():
    assert unigram_entropy(np.tile(np.arange(8), 10)) == pytest.approx(math.log(8))
