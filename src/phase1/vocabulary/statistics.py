"""Statistics of the training text for the token table: which tokens are frequent, and which are used alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.vocabulary.contexts import context_vectors
from phase1.vocabulary.levels import Level

ORDER_DIM = 64  # leading dimensions that decide which tokens are alike
RIDGE = 1e-3  # of the weights of anchors, against the mean square norm of a row
LEAF = 8  # groups of this size are not split further
STATISTICS_TOKENS = 50_000_000  # of a longer text, contexts are counted in this many first tokens
_CHUNK_TOKENS = 1 << 18  # as int64 they stay in a core's cache
_CHUNK_ROWS = 1 << 11


class TokenVectors(NamedTuple):
    """A vector and the frequency of every token, in the order of ids: what a dense table starts from."""

    log_frequency: np.ndarray
    """(V,) float32: log((count + 1) / (N + V))."""
    rows: np.ndarray
    """(V, m) float32 of mean square 1. Similar use, similar direction; random where never used."""


class TokenStatistics(NamedTuple):
    """What an HTT table starts from; all fields but `row_of_id` are in the order of the table's rows, not of ids."""

    row_of_id: np.ndarray
    """(V,) int64: row of each id in the table, frequent ids first, rare ids of similar use side by side."""
    log_frequency: np.ndarray
    """(V,) float32: log((count + 1) / (N + V))."""
    rows: np.ndarray
    """(K, m) float32 of mean square 1: where the dense rows start. Similar use, similar direction; random where never used."""
    anchors: np.ndarray
    """(n, k) int64: the rows that each of the last n rows is a sum of, all before its level."""
    weights: np.ndarray
    """(n, k) float32: the weights of that sum at the start."""
    residual: np.ndarray
    """(V - K, m) float32: initial residual of each row, its vector minus its anchor sum; zero beyond the level's ρ columns."""


def token_statistics(
    train_ids: np.ndarray,
    *,
    vocab_size: int,
    levels: Sequence[Level],
    dim: int,
    seed: int,
    device: str = "cpu",
) -> TokenStatistics:
    """What `phase1.layers.token_table.HTTTable` needs to know, from the training text only.

    Order of the rows: ids before the last level by frequency (ties: smaller id first), then the other ids that occur in
    `tree_order` of their vectors, then those that never occur, by id. Rows, anchors, weights and residual: `sparse_code`
    of the `dim` leading columns of U √Σ (`phase1.vocabulary.contexts.context_vectors`), scaled to rows of mean square 1.
    Deterministic for a seed. Peak memory: 32 kB per id that occurs (1.6 GB for GPT-2's).
    Raises ValueError for an id of V or more.
    """
    frequent = levels[-1].start
    by_rank = _by_frequency(train_ids, vocab_size, dim, seed, device)
    used = len(by_rank.meaning)
    rank_of_row = np.arange(vocab_size)
    if frequent < used:
        rank_of_row[frequent:used] = frequent + tree_order(by_rank.meaning[frequent:], seed)
    row_of_id = np.empty(vocab_size, dtype=np.int64)
    row_of_id[by_rank.ids[rank_of_row]] = np.arange(vocab_size)
    vectors = by_rank.rows[rank_of_row]
    code = sparse_code(torch.from_numpy(vectors).to(device), levels)
    rows = vectors[: levels[0].start]
    return TokenStatistics(row_of_id, by_rank.log_frequency[rank_of_row], rows, *(part.cpu().numpy() for part in code))


def token_vectors(train_ids: np.ndarray, *, vocab_size: int, dim: int, seed: int, device: str = "cpu") -> TokenVectors:
    """What `phase1.layers.token_table.DenseTable` starts from: frequencies and vectors of `token_statistics`, of every id."""
    by_rank = _by_frequency(train_ids, vocab_size, dim, seed, device)
    rank_of_id = np.argsort(by_rank.ids)
    return TokenVectors(by_rank.log_frequency[rank_of_id], by_rank.rows[rank_of_id])


class _ByFrequency(NamedTuple):
    """Statistics of all ids by frequency rank: the most frequent one first, those that never occur last."""

    ids: np.ndarray  # (V,)
    log_frequency: np.ndarray  # (V,) float32
    rows: np.ndarray  # (V, dim) float32: U √Σ in rows of mean square 1, random where the id never occurs
    meaning: np.ndarray  # (used, ≤ ORDER_DIM) float64: U Σ of those that occur


def _by_frequency(train_ids: np.ndarray, vocab_size: int, dim: int, seed: int, device: str) -> _ByFrequency:
    counts = token_counts(train_ids, vocab_size)
    id_of_rank = frequency_order(counts)
    used = int(np.count_nonzero(counts))
    rank_of_id = np.empty(vocab_size, dtype=np.int64)
    rank_of_id[id_of_rank] = np.arange(vocab_size)
    left, values = context_vectors(train_ids[:STATISTICS_TOKENS], rank_of_id, used, max(dim, ORDER_DIM), seed, device)
    meaning = (left * values)[:, :ORDER_DIM].cpu().numpy()
    rows = np.random.default_rng(seed).standard_normal((vocab_size, dim), dtype=np.float32)
    known = (left * values.sqrt())[:, :dim].float().cpu().numpy()
    size = np.linalg.norm(known, axis=1, keepdims=True) / max(1, known.shape[1]) ** 0.5
    rows[:used, : known.shape[1]] = known / (size + 1e-30)
    log_frequency = np.log((counts[id_of_rank] + 1) / (counts.sum() + vocab_size)).astype(np.float32)
    return _ByFrequency(id_of_rank, log_frequency, rows, meaning)


def sparse_code(vectors: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors (n, k), weights (n, k) and residuals (V - K, m) for which the table

        E_i = vectors[i] for i < K,   E_i = Σ_j w_ij E_{a_ij} + residual_i from K on

    comes near `vectors` (V, m); n rows have anchors. residual_i is vectors[i] - Σ_j w_ij E_{a_ij} in its first ρ columns and 0
    in the others. The anchors of a row are chosen among the rows E of all earlier levels by orthogonal matching pursuit: add
    the row of largest |cosine| with what is left, then fit all weights again by least squares with a small ridge.

    Source: Pati, Rezaiifar and Krishnaprasad 1993, "Orthogonal matching pursuit".
    """
    k = max(level.anchors for level in levels)
    made = vectors[: levels[0].start].double()
    codes, residuals = [(made.new_zeros(0, k, dtype=torch.int64), made.new_zeros(0, k))], []
    for level in levels:
        targets, unit = vectors[level.start : level.end].double(), F.normalize(made)
        parts = [_pursuit(target, made, unit, level.anchors) for target in targets.split(_CHUNK_ROWS)]
        chosen, weights, left = (torch.cat(part) for part in zip(*parts))
        residual = left.clone()
        residual[:, level.rank :] = 0
        made = torch.cat([made, targets - left + residual])
        residuals.append(residual)
        if level.anchors:
            codes.append((chosen, weights))
    chosen, weights = (torch.cat(part) for part in zip(*codes))
    return chosen, weights.float(), torch.cat(residuals).float()


def _pursuit(target: Tensor, rows: Tensor, unit: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors (n, k) and weights (n, k) of targets (n, m), and what they leave, (n, m)."""
    chosen = torch.zeros(len(target), 0, dtype=torch.int64, device=target.device)
    weights, left = target.new_zeros(len(target), 0), target
    for _ in range(count):
        fit = (left @ unit.T).abs_().scatter_(1, chosen, -1.0)  # in place: the largest thing here
        chosen = torch.cat([chosen, fit.argmax(1, keepdim=True)], 1)
        basis = rows[chosen]  # [n, j, m]
        ridge = RIDGE * rows.shape[1] * torch.eye(chosen.shape[1], dtype=rows.dtype, device=rows.device)
        weights = torch.linalg.solve(basis @ basis.mT + ridge, basis @ target[:, :, None]).squeeze(-1)
        left = target - (weights[:, None] @ basis).squeeze(1)
    return chosen, weights, left


def token_counts(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V,) int64: how often each id occurs. Raises ValueError for an id of V or more."""
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise ValueError(f"ids must be below --vocab-size={vocab_size}; got {largest}; raise --vocab-size")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(ids), _CHUNK_TOKENS):  # bincount makes eight bytes of every id it is given
        counts += np.bincount(ids[start : start + _CHUNK_TOKENS], minlength=vocab_size)
    return counts


def frequency_order(counts: np.ndarray) -> np.ndarray:
    """(V,) int64: all ids by falling count, ties by id."""
    return np.argsort(-counts, kind="stable")


def tree_order(vectors: np.ndarray, seed: int) -> np.ndarray:
    """(n,) int64 order of the rows of `vectors` (n, k) that puts similar rows next to each other.

    Every group of more than 8 rows is sorted along its principal axis and halved, until all are small.
    """
    generator = np.random.default_rng(seed)
    groups = [np.arange(len(vectors))]
    done: list[np.ndarray] = []
    while groups:  # depth first, left half first: `done` grows in the final order
        group = groups.pop()
        if len(group) <= LEAF:
            done.append(group)
            continue
        centred = vectors[group] - vectors[group].mean(0)
        axis = generator.standard_normal(vectors.shape[1])
        for _ in range(6):  # power iteration; an approximate axis separates as well
            axis = centred.T @ (centred @ axis)
            axis /= np.linalg.norm(axis) + 1e-9
        along = np.round(centred @ axis, 6)  # ties stay ties: equal vectors keep their order on any machine
        ordered = group[np.argsort(along, kind="stable")]
        groups += [ordered[len(group) // 2 :], ordered[: len(group) // 2]]
    return np.concatenate(done) if done else np.empty(0, dtype=np.int64)
