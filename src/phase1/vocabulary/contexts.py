"""How tokens are used: how often each stands near which others, and vectors that say it."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phase1.progress import progress

OVERSAMPLING = 16
SUBSPACE_ITERATIONS = 3
CHUNK_TOKENS = 1 << 21
CHUNK_ROWS = 1 << 11


class Contexts(NamedTuple):
    """Tokens of frequency ranks from `first` on, `most` of them, that stand at one of `distances` from a token.

    `sided`: before it is one context, and after it another.
    """

    first: int
    most: int
    distances: range
    sided: bool

    def ranks(self, used: int) -> int:
        """How many of them there are in a text of `used` different tokens."""
        return max(0, min(self.most, used - self.first))


GRAMMAR = Contexts(0, 2048, range(1, 3), sided=True)  # what stands beside a token: mostly function words
TOPIC = Contexts(64, 4096, range(3, 13), sided=False)  # what a text is about; the most frequent tokens say nothing of it


def context_vectors(
    ids: np.ndarray,
    rank_of_id: np.ndarray,
    used: int,
    dim: int,
    seed: int,
    device: str,
    contexts: tuple[Contexts, ...] = (GRAMMAR, TOPIC),
) -> tuple[Tensor, Tensor]:
    """U (used, ≤ dim) and Σ (≤ dim,), float64: a row for each frequency rank, from the tokens at most 12 positions away.

    With n_xc the occurrences of x with context c, n_x and n_c their sums over one index and n over both, these are left
    singular vectors and singular values of the smoothed positive pointwise mutual information
    log(1 + n_xc n / ((n_x + 1)(n_c + 1))), by randomised subspace iteration (Halko et al. 2011, algorithm 4.4). All sums are
    float64, so that the order of additions on a device does not decide the token order.
    """
    table = count_contexts(ids, rank_of_id, used, contexts, device)
    blocks = table.split(CHUNK_ROWS)  # views: the table is the largest thing here, so it changes in place
    row_sums = torch.cat([block.sum(1, dtype=torch.float64) for block in blocks])
    column_sums = torch.stack([block.sum(0, dtype=torch.float64) for block in blocks]).sum(0)
    shares = (column_sums + 1) / row_sums.sum()
    for block, sums in zip(blocks, row_sums.split(CHUNK_ROWS), strict=True):
        block.copy_(torch.log1p(block / torch.outer(sums + 1, shares)))

    def times(right: Tensor) -> Tensor:
        return torch.cat([block.double() @ right for block in blocks])

    def transposed_times(right: Tensor) -> Tensor:
        parts = zip(blocks, right.split(CHUNK_ROWS), strict=True)
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


def count_contexts(ids: np.ndarray, rank_of_id: np.ndarray, used: int, contexts: tuple[Contexts, ...], device: str) -> Tensor:
    """(used, n) float32: how often the token of rank x has each context; a sided kind has those before x, then those after."""
    starts = np.cumsum([0, *(kind.ranks(used) * (1 + kind.sided) for kind in contexts)])
    table = torch.zeros(used, int(starts[-1]), device=device)
    ranks_by_id = torch.from_numpy(rank_of_id).to(device)
    farthest = max(kind.distances[-1] for kind in contexts)
    for start in progress(range(0, len(ids), CHUNK_TOKENS), desc="token statistics", leave=False):
        chunk = ids[start : start + CHUNK_TOKENS + farthest].astype(np.int64)
        ranks = ranks_by_id[torch.from_numpy(chunk).to(device)]
        for kind, column in zip(contexts, starts):
            after = int(column) + kind.ranks(used) * kind.sided
            for distance in kind.distances:
                # the first token of a pair lies inside the chunk, so that a pair across two chunks counts once
                one, other = ranks[:-distance][:CHUNK_TOKENS], ranks[distance:][:CHUNK_TOKENS]
                _count(table, other, one - kind.first, kind.ranks(used), int(column))
                _count(table, one, other - kind.first, kind.ranks(used), after)
    return table


def _count(table: Tensor, tokens: Tensor, contexts: Tensor, count: int, column: int) -> None:
    """Add the pairs of a token and a context from 0 to `count` - 1, which has the columns from `column` on."""
    index = (tokens * table.shape[1] + column + contexts)[(contexts >= 0) & (contexts < count)]
    # whole numbers below 2^24 add exactly in float32, in any order
    table.view(-1).index_add_(0, index, torch.ones((), device=table.device).expand(len(index)))
