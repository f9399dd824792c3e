import numpy as np
import pytest
import torch

from phase1.vocabulary import contexts
from phase1.vocabulary import statistics as order
from phase1.vocabulary.levels import Level
from phase1.vocabulary.statistics import token_statistics, tree_order

V = 200


def levels_at(starts, vocab_size=V, anchors=3, ranks=(), first=0):
    """Levels that begin at `starts`, with anchors from the one of number `first` on."""
    ends = [*starts[1:], vocab_size]
    ranks = [*ranks, *[0] * len(starts)]
    return [
        Level(start, end, rank, anchors if i >= first else 0) for i, (start, end, rank) in enumerate(zip(starts, ends, ranks))
    ]


def token_order(ids, vocab_size, frequent, seed, device="cpu"):
    """The positions alone, every id past the frequent ones in the tree."""
    dense_rows = min(frequent, vocab_size)
    levels = levels_at([dense_rows], vocab_size, min(2, dense_rows))
    return token_statistics(ids, levels=levels, vocab_size=vocab_size, dim=8, seed=seed, device=device).row_of_id


def text_of_two_kinds(length=60_000, seed=0):
    """Ids 0-9 are frequent; 10-89 follow 0 and precede 1, 90-169 follow 2 and precede 3; 170-199 never occur."""
    rng = np.random.default_rng(seed)
    sentences = length // 4
    kind = rng.integers(0, 2, sentences)
    word = 10 + 80 * kind + rng.integers(0, 80, sentences)
    return np.stack([2 * kind, word, 2 * kind + 1, rng.integers(4, 10, sentences)], axis=1).ravel().astype(np.uint16)


@pytest.mark.parametrize("dense_rows", [0, 10, 170, 180, 200, 1000])
def test_order_is_a_permutation(dense_rows):
    assert sorted(token_order(text_of_two_kinds(), V, dense_rows, seed=0)) == list(range(V))


def test_frequent_ids_come_first_and_unused_ones_last():
    ids = text_of_two_kinds()
    position = token_order(ids, V, 10, seed=0)
    counts = np.bincount(ids, minlength=V)
    first = np.argsort(position)[:10]
    assert set(first) == set(range(10))
    assert list(counts[first]) == sorted(counts[first], reverse=True)
    assert list(np.argsort(position)[170:]) == list(range(170, 200))


def test_ids_used_alike_stand_together():
    tail = np.argsort(token_order(text_of_two_kinds(), V, 10, seed=0))[10:170]
    kinds = (tail >= 90).astype(int)
    assert np.abs(np.diff(kinds)).sum() == 1  # one kind, then the other


def test_order_repeats_for_a_seed_and_whatever_the_chunks(monkeypatch):
    ids = text_of_two_kinds()
    first = token_order(ids, V, 10, seed=5)
    assert np.array_equal(first, token_order(ids, V, 10, seed=5))
    assert not np.array_equal(first, token_order(ids, V, 10, seed=6))
    for module, prefix in ((order, "_"), (contexts, "")):
        monkeypatch.setattr(module, f"{prefix}CHUNK_TOKENS", 777)
        monkeypatch.setattr(module, f"{prefix}CHUNK_ROWS", 13)
    assert np.array_equal(first, token_order(ids, V, 10, seed=5))


def test_statistics_repeat_for_a_seed():
    sizes = {"vocab_size": V, "levels": levels_at([10, 20, 40], ranks=[5, 3]), "dim": 12, "seed": 4}
    found = [token_statistics(text_of_two_kinds(), **sizes) for _ in range(2)]
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def rows_of(dense, anchors, weights, rest, levels):
    """All rows as a code makes them, one after the other."""
    rows = list(dense)
    for own in rest:
        level = next(level for level in levels if level.start <= len(rows) < level.end)
        assert not own[level.rank :].any()
        if level.anchors:
            i = len(rows) - (len(dense) + len(rest) - len(anchors))
            assert max(anchors[i]) < level.start
            own = own + sum(w * rows[a] for w, a in zip(weights[i], anchors[i]))
        rows.append(own)
    return np.stack(rows)


def test_frequencies_and_vectors_stand_in_the_order_of_positions():
    ids = text_of_two_kinds()
    levels = levels_at([40, 80])
    found = token_statistics(ids, vocab_size=V, levels=levels, dim=12, seed=0)
    id_at = np.argsort(found.row_of_id)
    counts = np.bincount(ids, minlength=V)[id_at]
    np.testing.assert_allclose(found.log_frequency, np.log((counts + 1) / (len(ids) + V)), rtol=1e-6)
    np.testing.assert_allclose((found.rows**2).mean(1), 1, rtol=1e-5)
    rest = rows_of(found.rows, found.anchors, found.weights, found.residual, levels)[40:]
    kind, same = np.where(id_at < 90, 0, 1)[40:170], rest[:130] @ rest[:130].T / 12
    assert same[kind[:, None] == kind].mean() > same[kind[:, None] != kind].mean() + 0.1


def test_a_sparse_code_of_rows_that_are_sums_of_two_is_exact_and_more_anchors_come_nearer(monkeypatch):
    monkeypatch.setattr(order, "RIDGE", 1e-12)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 64, generator=generator)
    pairs = torch.stack([torch.randperm(20, generator=generator)[:2] for _ in range(30)])
    vectors = torch.cat([rows, 2 * rows[pairs[:, 0]] - rows[pairs[:, 1]]])
    errors = []
    for count in (1, 2):
        anchors, weights, rest = order.sparse_code(vectors, levels_at([20], 50, count))
        assert not rest.any()
        made = (weights[..., None] * rows[anchors]).sum(1)
        errors.append(float((made - vectors[20:]).norm()))
        assert all(len(set(a)) == count for a in anchors.tolist())
    assert errors[1] < 1e-3 < 0.1 * errors[0]


def coded(vectors, starts, count, **parts):
    """The anchors of a code, and the rows it makes, float64."""
    levels = levels_at(starts, len(vectors), count, **parts)
    anchors, weights, rest = order.sparse_code(vectors, levels)
    dense = vectors[: starts[0]].double().numpy()
    rows = rows_of(dense, anchors.numpy(), weights.double().numpy(), rest.double().numpy(), levels)
    return anchors, torch.from_numpy(rows)


@pytest.mark.parametrize("count", [2, 4])
def test_more_levels_leave_less(count):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 24, generator=generator) @ torch.randn(24, 48, generator=generator)
    vectors[60:] += vectors[torch.randint(20, 60, (140,), generator=generator)]
    one, two = ((coded(vectors, levels, count)[1] - vectors)[60:].square().sum() for levels in ([20], [20, 60]))
    assert two < 0.95 * one


def test_a_level_is_coded_with_the_rows_before_it_as_they_start(monkeypatch):
    monkeypatch.setattr(order, "RIDGE", 1e-12)
    monkeypatch.setattr(order, "_CHUNK_ROWS", 13)
    vectors = torch.randn(120, 48, generator=torch.Generator().manual_seed(0))
    anchors, rows = coded(vectors, [20, 40, 60], 3)
    left = vectors.double() - rows
    assert (anchors[40:] >= 20).any() and all(len(set(a)) == 3 for a in anchors.tolist())
    for i in range(20, 120):  # least squares: what is left is orthogonal to the anchors
        torch.testing.assert_close(rows[anchors[i - 20]] @ left[i], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_what_a_row_has_of_its_own_is_the_leading_part_of_what_its_anchors_leave(monkeypatch):
    monkeypatch.setattr(order, "RIDGE", 1e-12)
    monkeypatch.setattr(order, "_CHUNK_ROWS", 13)
    vectors = torch.randn(120, 48, generator=torch.Generator().manual_seed(0))
    anchors, rows = coded(vectors, [20, 40, 60, 80], 3, ranks=[48, 30, 10], first=2)
    assert anchors.shape == (60, 3)
    left = vectors.double() - rows
    torch.testing.assert_close(left[:40], torch.zeros(40, 48, dtype=torch.float64), rtol=0, atol=1e-5)  # all 48 columns
    assert left[40:60, :30].abs().max() < 1e-5 < left[40:60, 30:].square().mean() and left[60:80, :10].abs().max() < 1e-5
    _, without = coded(vectors, [20, 40, 60, 80], 3, first=2)
    assert left.square().sum() < 0.8 * (vectors - without).square().sum()


@pytest.mark.parametrize("starts", [[20], [20, 25], [20, 21, 29], [30], [0]])
def test_codes_with_few_levels_or_nothing_to_code_are_codes_too(starts):
    dense_rows = starts[0]
    vectors = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    anchors, rows = coded(vectors, starts, min(2, dense_rows))
    assert anchors.shape == (30 - dense_rows if dense_rows else 0, min(2, dense_rows))
    assert (rows - vectors).norm() <= vectors.double().norm()


def test_tree_keeps_the_order_of_points_on_a_line():
    points = torch.randperm(64, generator=torch.Generator().manual_seed(0)).double()
    in_order = points[tree_order((points[:, None] * torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)).numpy(), seed=0)]
    blocks = in_order.view(8, 8).sort(1).values  # the direction of each split is free, its groups are not
    assert sorted(map(tuple, blocks.tolist())) == [tuple(range(8 * i, 8 * i + 8)) for i in range(8)]


def test_degenerate_texts_still_have_an_order():
    for ids in (np.empty(0, np.uint16), np.zeros(5, np.uint16), np.array([3, 1], np.uint16)):
        assert sorted(token_order(ids, 20, 0, seed=0)) == list(range(20))


def test_an_id_above_the_vocabulary_is_one_line():
    with pytest.raises(ValueError, match="^ids must be below --vocab-size=5; got 9; [^\n]*$"):
        token_order(np.array([1, 9], np.uint16), 5, 2, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_change_the_order():
    ids = text_of_two_kinds()
    assert np.array_equal(token_order(ids, V, 10, seed=0), token_order(ids, V, 10, seed=0, device="cuda"))
