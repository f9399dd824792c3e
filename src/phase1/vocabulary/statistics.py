"""Statistics of the training text for the token table: which tokens are frequent, and which are used alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.progress import progress
from phase1.vocabulary.levels import Level

CONTEXTS = 2048  # most frequent tokens that count as neighbours, on each side
NEIGHBOURS = (1, 2)  # distances at which they count
ORDER_DIM = 64  # leading dimensions that decide which tokens are alike
OVERSAMPLING = 16
SUBSPACE_ITERATIONS = 3
RIDGE = 1e-3  # of the weights of anchors, against the mean square norm of a row
LEAF = 8  # groups of this size are not split further
STATISTICS_TOKENS = 50_000_000  # of a longer text, the neighbours are counted in this many first tokens
_CHUNK_TOKENS = 1 << 21
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
    of the `dim` leading columns of U √Σ (`neighbour_vectors`), scaled to rows of mean square 1.
    Deterministic for a seed. Peak memory: 16 kB per id that occurs (0.8 GB for GPT-2's).
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
    left, values = neighbour_vectors(train_ids[:STATISTICS_TOKENS], rank_of_id, used, max(dim, ORDER_DIM), seed, device)
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


def neighbour_vectors(
    ids: np.ndarray, rank_of_id: np.ndarray, used: int, dim: int, seed: int, device: str
) -> tuple[Tensor, Tensor]:
    """U (used, ≤ dim) and Σ (≤ dim,), float64: a row for each frequency rank, from the tokens at most 2 positions away.

    With n_xc the occurrences of x with context c (a frequent token and a side), n_x and n_c their sums over one index
    and n over both, these are left singular vectors and singular values of the smoothed positive pointwise
    mutual information log(1 + n_xc n / ((n_x + 1)(n_c + 1))), by randomised subspace iteration (Halko et al. 2011,
    algorithm 4.4). All sums are float64, so that the order of additions on a device does not decide the token order.
    """
    contexts = min(CONTEXTS, used)
    table = _count_neighbours(ids, rank_of_id, used, contexts, device)  # [used, 2 * contexts]
    blocks = table.split(_CHUNK_ROWS)  # views: the table is the largest thing here, so it changes in place
    row_sums = torch.cat([block.sum(1, dtype=torch.float64) for block in blocks])
    column_sums = torch.stack([block.sum(0, dtype=torch.float64) for block in blocks]).sum(0)
    shares = (column_sums + 1) / row_sums.sum()
    for block, sums in zip(blocks, row_sums.split(_CHUNK_ROWS), strict=True):
        block.copy_(torch.log1p(block / torch.outer(sums + 1, shares)))

    def times(right: Tensor) -> Tensor:
        return torch.cat([block.double() @ right for block in blocks])

    def transposed_times(right: Tensor) -> Tensor:
        parts = zip(blocks, right.split(_CHUNK_ROWS), strict=True)
        return sum((block.double().T @ part for block, part in parts), start=torch.zeros((), device=device))

    generator = torch.Generator().manual_seed(seed)
    width = min(dim + OVERSAMPLING, *table.shape)
    start = torch.randn(table.shape[1], width, generator=generator, dtype=torch.float64).to(device)
    basis = torch.linalg.qr(times(start)).Q
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(times(torch.linalg.qr(transposed_times(basis)).Q)).Q
    _, values, left = torch.linalg.svd(transposed_times(basis), full_matrices=False)
    vectors = (basis @ left.T)[:, :dim]
    signs = torch.where(vectors.sum(0) < 0, -1.0, 1.0)  # a singular vector's sign is the library's choice
    return vectors * signs, values[:dim]


def _count_neighbours(ids: np.ndarray, rank_of_id: np.ndarray, used: int, contexts: int, device: str) -> Tensor:
    """(used, 2 * contexts) float32: how often the token of rank x has that of rank c before it, and after it."""
    table = torch.zeros(used, 2 * contexts, device=device)
    flat = table.view(-1)
    ranks_by_id = torch.from_numpy(rank_of_id).to(device)
    starts = range(0, len(ids), _CHUNK_TOKENS)
    for start in progress(starts, desc="token statistics", leave=False):
        chunk = ids[start : start + _CHUNK_TOKENS + max(NEIGHBOURS)].astype(np.int64)
        ranks = ranks_by_id[torch.from_numpy(chunk).to(device)]
        for distance in NEIGHBOURS:
            # the first token of a pair lies inside the chunk, so that a pair across two chunks counts once
            first, second = ranks[:-distance][:_CHUNK_TOKENS], ranks[distance:][:_CHUNK_TOKENS]
            for token, context, side in ((second, first, 0), (first, second, contexts)):
                index = (token * (2 * contexts) + context + side)[context < contexts]
                # whole numbers below 2^24 add exactly in float32, in any order
                flat.index_add_(0, index, torch.ones((), device=device).expand(len(index)))
    return table


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
