import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1.config import EngineShape
from phase1.data.tokenizer_files import GPT2_FINGERPRINT
from phase1.measure.perplexity.evaluate import Evaluation, Protocol, evaluate, unigram_entropy, windows
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE, chunked
from phase1.records.schema import FILES, read_report
from phase1.roster import model_config

TINY = EngineShape(
    vocab_size=50, d_model=16, n_layers=1, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
    htt_rank=3, htt_dense_rows=10, htt_groups=6,
)  # fmt: skip


def protocol(seq_length=8, max_windows=None, stride=None, **changes):
    sizes = {"seq_length": seq_length, "stride": stride or seq_length, "max_windows": max_windows}
    return Protocol(**({"dataset_sha256": "d", "tokenizer_sha256": "t", "split": "valid", "prefix": 49} | sizes | changes))


def model(role="phase1"):
    torch.manual_seed(0)
    return LanguageModel(model_config(role, TINY)).double()


def text(length=101):
    return np.random.default_rng(0).integers(0, 49, length).astype(np.uint16)


def rows(ids, protocol, batch_size=4):
    """Every window: its inputs and targets, lists."""
    return [(i.tolist(), t.tolist()) for batch in windows(ids, protocol, batch_size) for i, t in zip(*batch)]


@given(
    length=st.integers(1, 80),
    sizes=st.integers(1, 20).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))),
    max_windows=st.none() | st.integers(1, 30),
    batch_size=st.integers(1, 9),
)
@settings(deadline=None, max_examples=300)
def test_every_token_is_a_target_once_in_order_and_sees_what_the_protocol_says(length, sizes, max_windows, batch_size):
    T, S = sizes
    ids = np.arange(length, dtype=np.uint16) + 1000
    stream = [49, *ids.tolist()]
    scored = []
    found = rows(ids, protocol(T, max_windows, S), batch_size)
    for number, (inputs, targets) in enumerate(found):
        start = number * S
        assert inputs == stream[start : start + T][: len(targets)]
        assert len(inputs) == T or number == len(found) - 1
        for place, target in enumerate(targets):
            if target != IGNORE:
                assert target == stream[start + place + 1]
                assert number == 0 or place >= T - S  # past the first window, on T - S + 1 to T tokens
                scored.append(target)
    expected = length if max_windows is None else min(length, T + (max_windows - 1) * S)
    assert scored == ids[:expected].tolist()
    assert all(any(t != IGNORE for t in targets) for _, targets in found)


def test_max_windows_scores_the_beginning_of_the_text():
    assert sum((t for _, t in rows(text(101), protocol(8, max_windows=3))), []) == text(101)[:24].tolist()


@pytest.mark.parametrize("role", ["baseline", "phase1"])
@pytest.mark.parametrize("stride", [8, 3])
def test_neither_batch_size_nor_the_end_of_the_text_change_a_loss(role, stride):
    """Against the logits of every window by itself: nothing is padded, so rounding alone is left."""
    net, ids = model(role), text()
    results = [evaluate(net, ids, protocol(stride=stride), batch_size=size, dtype=torch.float32) for size in (1, 3, 100)]
    expected = []
    for inputs, targets in rows(ids, protocol(stride=stride)):
        log_p = net(torch.tensor([inputs]))[0].log_softmax(-1)
        expected += [-log_p[place, target].item() for place, target in enumerate(targets) if target != IGNORE]
    for result in results:
        np.testing.assert_allclose(result.losses, expected, rtol=1e-10)  # all in float64
        assert (result.places == results[0].places).all() and (result.tokens == results[0].tokens).all()
        assert result.effective_rank == (None if role == "baseline" else pytest.approx(results[0].effective_rank, rel=1e-10))


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_a_text_read_as_one_stream_has_the_losses_of_one_long_window(role):
    """Eight times the length of the pieces: the state carries the whole context of the engine."""
    net, ids = model(role), text(128)
    whole = evaluate(net, ids, protocol(seq_length=128), batch_size=1, dtype=torch.float32)
    stream, state, losses = torch.tensor([[49, *ids.tolist()]]), None, []
    for start in range(0, 128, 16):
        logits, state = net.continue_from(stream[:, start : start + 16], state)
        picked = logits.log_softmax(-1).gather(2, stream[:, start + 1 : start + 17, None])
        losses += (-picked).flatten().tolist()
    np.testing.assert_allclose(whole.losses, losses, rtol=1e-10)


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_losses_in_pieces_are_those_of_whole_windows(role):
    """Attention, whose state grows, takes windows whole."""
    net, ids = model(role), text(128)
    whole, pieces = (
        evaluate(net, ids, protocol(seq_length=100), batch_size=2, dtype=torch.float32, piece_length=n) for n in (None, 13)
    )
    np.testing.assert_allclose(pieces.losses, whole.losses, rtol=1e-10)
    assert pieces.effective_rank == (None if role == "baseline" else pytest.approx(whole.effective_rank, rel=1e-10))


def test_no_tensor_of_tokens_times_vocabulary_is_made_at_long_windows(monkeypatch):
    """T x V float32 logits of T = 16384 at V = 50257 would be 3.3 GB; here the limit is 20 tokens of float64 logits at once."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunked.USUAL_PARTS * 20 * 8 * TINY.vocab_size)
    sizes = []
    original = chunked.softmax_rows
    monkeypatch.setattr(chunked, "softmax_rows", lambda *a: sizes.append(len(a[0])) or original(*a))
    for role in ("baseline", "phase1"):
        evaluate(model(role), text(300), protocol(seq_length=256, stride=10), batch_size=3, dtype=torch.float32)
    assert max(sizes) == 20 and sum(sizes) == 2 * 300  # and none for what is not scored


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_no_state_of_a_block_is_alive_when_the_next_one_runs(role):
    """States grow with T, or are views of what does; nobody reads them here."""
    net = LanguageModel(model_config(role, replace(TINY, n_layers=2)))
    states, alive = [], []

    def after(module, args, output):
        states.extend(weakref.ref(part) for part in output[1] if isinstance(part, torch.Tensor))

    net.blocks[0].mixer.register_forward_hook(after)
    net.blocks[1].register_forward_pre_hook(lambda module, args: alive.append(sum(state() is not None for state in states)))
    evaluate(net, text(16), protocol(seq_length=16), batch_size=1, dtype=torch.float32)
    assert states and alive == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_a_window_of_16384_tokens_is_scored_in_less_than_half_its_logits(role):
    sizes = EngineShape(d_model=64, n_layers=2, n_heads=2)  # V = 50257
    net = LanguageModel(model_config(role, sizes)).cuda()
    ids = np.random.default_rng(0).integers(0, sizes.vocab_size, 16384)
    torch.cuda.reset_peak_memory_stats()
    result = evaluate(net, ids, protocol(seq_length=16384), batch_size=1, dtype=torch.float16)
    assert len(result.losses) == 16384 and np.isfinite(result.losses).all()
    assert torch.cuda.max_memory_allocated() < 0.5 * 4 * 16384 * sizes.vocab_size


@pytest.mark.parametrize("role", ["baseline", "phase1"])
def test_a_uniform_model_has_the_perplexity_of_the_vocabulary(role):
    net = model(role)
    with torch.no_grad():
        net.norm.weight.zero_()  # all logits 0
        if net.copy_head is not None:
            net.copy_head.gate_bias.fill_(-1e4)  # and nothing copied
    result = evaluate(net, text(), protocol(), batch_size=4, dtype=torch.float32)
    assert result.perplexity == pytest.approx(50, rel=1e-9)
    assert result.tokens.sum() == 101


def test_evaluation_leaves_the_training_mode_as_it_was():
    net = model().train()
    evaluate(net, text(), protocol(), batch_size=4, dtype=torch.float32)
    assert net.training


def test_bits_per_byte_and_word_perplexity_follow_their_formulas():
    result = Evaluation(np.array([1.0, 2.0, 3.0, 1.5, 2.5]), np.arange(5), np.array([3, 2]), None)
    assert result.nll_nats.tolist() == [6.0, 4.0]
    assert result.loss == 2.0 and result.perplexity == pytest.approx(math.e**2)
    assert result.bits_per_byte(20) == pytest.approx(10 / math.log(2) / 20)
    assert result.word_perplexity(4) == pytest.approx(math.exp(2.5))


@pytest.mark.parametrize(
    "change",
    [{"seq_length": 9}, {"stride": 7}, {"max_windows": 1}, {"prefix": 0}, {"dataset_sha256": "e"}, {"tokenizer_sha256": "u"}, {"split": "test"}],
)  # fmt: skip
def test_every_part_of_the_protocol_is_in_its_hash(change):
    assert protocol().protocol_hash == protocol().protocol_hash != protocol(**change).protocol_hash


def test_the_hash_of_windows_side_by_side_is_the_one_of_results_from_before_the_stride():
    path = Path(__file__).parents[2] / "fixtures" / "v1" / FILES["perplexity"]
    report = read_report(path, "perplexity")
    for result in report.results.values():
        T = report.run["seq_length"]
        same = Protocol(result.dataset.sha256, GPT2_FINGERPRINT, result.dataset.split, T, T, prefix=50256, max_windows=None)
        assert same.protocol_hash == result.protocol_hash == "a80c91cd4e81"


def test_every_stride_is_a_protocol_of_its_own():
    assert len({protocol(8, stride=stride).protocol_hash for stride in range(1, 9)}) == 8


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        rows(text(0), protocol())


def test_unigram_entropy_of_a_uniform_text_is_the_logarithm():
    assert unigram_entropy(np.tile(np.arange(8), 10)) == pytest.approx(math.log(8))
