"""Contexts are counted as a plain loop does, and their vectors are the leading part of what they say."""

import numpy as np
import pytest
import torch

from phase1.vocabulary import contexts
from phase1.vocabulary.contexts import Contexts, context_vectors, count_contexts

SIDED = Contexts(0, 5, range(1, 3), sided=True)
LOOSE = Contexts(3, 6, range(3, 6), sided=False)


@pytest.mark.parametrize("kinds", [(SIDED,), (LOOSE,), (SIDED, LOOSE), (Contexts(9, 40, range(2, 3), sided=True), SIDED)], ids=str)
def test_contexts_are_counted_as_a_plain_loop_does(monkeypatch, kinds):
    monkeypatch.setattr(contexts, "CHUNK_TOKENS", 7)
    ids = np.random.default_rng(0).integers(0, 12, 100)
    rank = np.random.default_rng(1).permutation(12)
    parts = []
    for kind in kinds:
        last = min(12, kind.first + kind.most)
        before, after = np.zeros((2, 12, last - kind.first))
        for i in range(len(ids)):
            for j in range(len(ids)):
                if abs(i - j) in kind.distances and kind.first <= rank[ids[j]] < last:
                    (before if j < i else after)[rank[ids[i]], rank[ids[j]] - kind.first] += 1
        parts += [before, after] if kind.sided else [before + after]
    assert np.array_equal(count_contexts(ids, rank, 12, kinds, "cpu").numpy(), np.concatenate(parts, 1))


def test_a_text_of_few_tokens_has_no_topic():
    ids = np.random.default_rng(0).integers(0, 20, 500)
    vectors, _ = context_vectors(ids, np.arange(20), 20, 8, seed=0, device="cpu")
    assert count_contexts(ids, np.arange(20), 20, (contexts.GRAMMAR, contexts.TOPIC), "cpu").shape == (20, 40)
    assert vectors.shape == (20, 8) and vectors.isfinite().all()


def test_vectors_are_the_leading_part_of_the_information_matrix():
    ids = np.random.default_rng(0).integers(0, 170, 20_000)  # noise: every singular value matters
    rank = np.arange(170)
    n = count_contexts(ids, rank, 170, (contexts.GRAMMAR, contexts.TOPIC), "cpu").double()
    information = torch.log1p(n * n.sum() / ((n.sum(1, keepdim=True) + 1) * (n.sum(0) + 1)))
    left, values, right = torch.linalg.svd(information, full_matrices=False)
    best = left[:, :64] * values[:64] @ right[:64]
    vectors, scales = context_vectors(ids, rank, 170, 64, seed=0, device="cpu")
    torch.testing.assert_close(scales, values[:64], rtol=0.05, atol=0)  # a flat spectrum: the last ones converge slowly
    assert vectors.shape == (170, 64)
    projected = vectors @ torch.linalg.lstsq(vectors, information).solution
    error, least = (projected - information).norm(), (best - information).norm()
    assert error < 1.01 * least  # random subspace: near the best rank-64 approximation, never better
