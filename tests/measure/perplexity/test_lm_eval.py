"""Conformance with lm-eval: the vectors were made once by its own functions (fixtures/make_lm_eval_vectors.py)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from phase1.data import count_words
from phase1.measure.perplexity.evaluate import Evaluation, Protocol, evaluate
from phase1.ops.cross_entropy import tied_nll

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "lm_eval_vectors.json").read_text())
CASES = [
    pytest.param(text, rolling, id=f"{name}, T {rolling['max_seq_len']}, context {rolling['context_len']}")
    for name, text in VECTORS["texts"].items()
    for rolling in text["rolling"]
]
AGREE = 1e-6  # relative


class FixedModel(torch.nn.Module):
    """The model of the vectors, with our loss."""

    def __init__(self):
        super().__init__()
        number, d = torch.arange(VECTORS["vocab_size"], dtype=torch.float64)[:, None], torch.arange(VECTORS["width"])
        self.rows = torch.nn.Parameter(torch.sin(1.3 * number * (d + 1) + d))
        self.table = 2 * torch.cos(0.7 * number * (d + 1) + d**2)

    def nll(self, ids, targets, piece_length=None):
        state, states = torch.zeros(len(ids), VECTORS["width"], dtype=torch.float64), []
        for token in ids.unbind(1):
            state = 0.8 * state + self.rows[token]
            states.append(state)
        return tied_nll(torch.stack(states, 1).flatten(0, 1), self.table, targets.flatten()).view(targets.shape), None


def ours(ids, rolling, batch_size=3):
    """Our evaluation with lm-eval's sizes: its context_len leaves max_seq_len - context_len + 1 targets a window."""
    stride = rolling["max_seq_len"] - rolling["context_len"] + 1
    protocol = Protocol("d", "t", "valid", rolling["max_seq_len"], stride, VECTORS["end_of_text"], None)
    return evaluate(FixedModel(), np.array(ids, np.uint16), protocol, batch_size=batch_size, dtype=torch.float32)


def test_the_vectors_hold_the_texts_that_are_counted_differently():
    assert {"japanese", "newlines", "one word", "trailing newline", "empty lines", "wikitext"} <= VECTORS["texts"].keys()
    assert VECTORS["lm_eval"]


@pytest.mark.parametrize("text, rolling", CASES)
def test_equal_losses_give_the_metrics_of_lm_eval(text, rolling):
    losses = -np.array(rolling["log_likelihoods"])
    result = Evaluation(losses, np.zeros(len(losses), int), np.array(rolling["window_targets"]), None)
    assert result.perplexity == pytest.approx(rolling["token_perplexity"], rel=AGREE)
    assert result.bits_per_byte(len(text["text"].encode())) == pytest.approx(rolling["bits_per_byte"], rel=AGREE)
    assert 2 ** result.bits_per_byte(rolling["bytes"]) == pytest.approx(rolling["byte_perplexity"], rel=AGREE)
    assert math.log(result.word_perplexity(rolling["words"])) == pytest.approx(math.log(rolling["word_perplexity"]), rel=AGREE)


@pytest.mark.parametrize("text, rolling", CASES)
def test_equal_windows_give_the_losses_of_lm_eval(text, rolling):
    """All windows but a last one that is not full: lm-eval moves it back over earlier tokens, ours begins where it begins."""
    result = ours(text["ids"], rolling)
    assert result.tokens.tolist() == rolling["window_targets"]
    stride = rolling["max_seq_len"] - rolling["context_len"] + 1
    moved = len(result.tokens) > 1 and result.tokens[-1] < stride
    same = len(text["ids"]) - (int(result.tokens[-1]) if moved else 0)
    np.testing.assert_allclose(result.losses[:same], -np.array(rolling["log_likelihoods"])[:same], rtol=AGREE)
    if not moved:
        assert result.perplexity == pytest.approx(rolling["token_perplexity"], rel=AGREE)
        assert result.bits_per_byte(rolling["bytes"]) == pytest.approx(rolling["bits_per_byte"], rel=AGREE)
        assert result.word_perplexity(rolling["words"]) == pytest.approx(rolling["word_perplexity"], rel=AGREE)


def test_the_sliding_windows_that_are_full_agree_to_the_end_of_the_text():
    """So that the case above is not only about windows that differ at their end."""
    text = VECTORS["texts"]["whole windows"]
    slid = [r for r in text["rolling"] if sum(r["window_targets"]) > r["max_seq_len"] > r["context_len"] > 1]
    assert slid and all(r["window_targets"][-1] == r["max_seq_len"] - r["context_len"] + 1 for r in slid)


@pytest.mark.parametrize(
    "name, words, lm_eval",
    [("ascii", 15, 15), ("one word", 1, 1), ("trailing newline", 6, 6), ("empty lines", 10, 4), ("newlines", 13, 7)],
)
def test_words_differ_by_design_and_perplexity_per_word_follows_the_count(name, words, lm_eval):
    """Ours: words between white space plus one per newline. lm-eval: pieces of a split at white space, empty ends included."""
    text = VECTORS["texts"][name]
    rolling = text["rolling"][-1]
    assert (count_words(text["text"]), rolling["words"]) == (words, lm_eval)
    result = ours(text["ids"], rolling)
    assert math.log(result.word_perplexity(words)) * words == pytest.approx(math.log(rolling["word_perplexity"]) * lm_eval)


def test_end_of_text_after_a_document_is_one_target_more_than_lm_eval_scores():
    text = VECTORS["texts"]["ascii"]
    rolling = text["rolling"][-1]
    marked = ours([*text["ids"], VECTORS["end_of_text"]], rolling)
    assert len(marked.losses) == len(rolling["log_likelihoods"]) + 1
    np.testing.assert_allclose(marked.losses[:-1], -np.array(rolling["log_likelihoods"]), rtol=AGREE)
