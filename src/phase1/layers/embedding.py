"""Token tables, tied to the output: a dense one, and HTT, whose rows past the frequent ones cost a few numbers each."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from phase1.ops.anchored_table import Users, anchored_table, users_of
from phase1.ops.htt import Cores, htt_table
from phase1.vocabulary import TokenStatistics

TAIL_START = 8  # the tail begins at this multiple of the dense rows, a power of 2
BAND_RANK = 2  # rank of the band between dense rows and tail, as a multiple of r
VECTOR_DIM = 192  # of the vectors that decide anchors and where rows start


class DenseTable(nn.Module):
    """One row of width D per token; the position of a token in the table is its id."""

    output_bias = None

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(vocab_size, d_model) / math.sqrt(d_model))

    def positions(self, ids: Tensor) -> Tensor:
        return ids

    def table(self, dtype: torch.dtype) -> Tensor:
        """All rows; a parameter, so in its own dtype: the ops cast it."""
        return self.rows


class LowRankBand(nn.Module):
    """n rows coefficients @ basis, (n, k) @ (k, D), that start at 0: a tensor train with one slot in its second core."""

    def __init__(self, n: int, d_model: int, rank: int) -> None:
        super().__init__()
        self.n = n
        self.coefficients = nn.Parameter(torch.zeros(n, rank))
        self.basis = nn.Parameter(torch.randn(rank, d_model) / math.sqrt(rank))

    def table(self, dtype: torch.dtype) -> Tensor:
        return self.coefficients.to(dtype) @ self.basis.to(dtype)


class TensorTrainTail(nn.Module):
    """n rows as a holographic tensor train of r terms on a grid of `groups` x ceil(n / groups) (ops/htt/reference.py).

    Rows start with standard deviation `std`.
    """

    def __init__(self, n: int, d_model: int, rank: int, groups: int, std: float) -> None:
        super().__init__()
        self.n = n
        v1 = min(groups, n)
        v2 = math.ceil(n / v1)
        d1 = max(d for d in range(1, math.isqrt(d_model) + 1) if d_model % d == 0)
        start = (std**2 * 2 / rank) ** 0.25  # a cosine has mean square 1/2
        self.core_a = nn.Parameter(torch.randn(v1, rank, d1) * start)
        self.core_b = nn.Parameter(torch.randn(v2, rank, d_model // d1) * start)
        self.phase_a = nn.Parameter(torch.rand(v1, rank) * 2 * math.pi)
        self.phase_b = nn.Parameter(torch.rand(v2, rank) * 2 * math.pi)
        self.bias_b = nn.Parameter(torch.zeros(v2, d_model))

    @property
    def cores(self) -> Cores:
        return Cores(self.core_a, self.core_b, self.phase_a, self.phase_b, None, self.bias_b)

    def table(self, dtype: torch.dtype) -> Tensor:
        return htt_table(self.cores, dtype)[: self.n]


class HTTTable(nn.Module):
    """K dense rows for frequent tokens; each other row is a weighted sum of rows before it, and a small row of its own.

    E_i = Σ_j w_ij E_a_ij + (K ≤ i < 8K: row of a band of rank 2r; above: tensor train of r terms)

    with r anchors a_ij, rows that are used like i. Levels begin at K, 2K, 4K and 8K (`levels`); anchors are of an earlier
    level, so the table is made level by level. Every token also has an output bias.

    Args:
        vocab_size, d_model: V and D.
        rank: r.
        dense_rows: K.
        groups: v1 of the tail's grid.
        statistics: of the training text: order, frequencies, anchors, where rows start; None: ids in order, all random.
    """

    positions_of: Tensor
    anchors: Tensor

    def __init__(
        self, vocab_size: int, d_model: int, rank: int, dense_rows: int, groups: int, statistics: TokenStatistics | None = None
    ) -> None:
        super().__init__()
        past, k = vocab_size - dense_rows, anchor_count(rank, dense_rows)
        self.dense_rows, self.tail_start = dense_rows, min(TAIL_START * dense_rows, vocab_size)
        band, tail = self.tail_start - dense_rows, vocab_size - self.tail_start
        self.register_buffer("positions_of", torch.arange(vocab_size))
        self.levels = levels(dense_rows, vocab_size)
        anchors = [torch.randint(max(1, start), (end - start, k)) for start, end in pairwise(self.levels)]
        self.register_buffer("anchors", torch.cat(anchors))
        self.rows = nn.Parameter(torch.randn(dense_rows, d_model) / math.sqrt(d_model))
        self.weights = nn.Parameter(torch.randn(past, k) / math.sqrt(max(1, k)))
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.band = LowRankBand(band, d_model, min(BAND_RANK * rank, d_model)) if band else None
        std = (0.1 if k else 1.0) / math.sqrt(d_model)  # next to anchors the tensor train is a correction
        self.tail = TensorTrainTail(tail, d_model, rank, groups, std) if tail else None
        if statistics is not None:
            self._use(statistics)
        self._turn_anchors()

    def _use(self, statistics: TokenStatistics) -> None:
        positions = torch.from_numpy(statistics.positions)
        if not torch.equal(positions.sort().values, self.positions_of):
            raise ValueError(f"positions must hold 0 to {len(self.positions_of) - 1} once each; they do not")
        self.positions_of.copy_(positions)
        self.anchors.copy_(torch.from_numpy(statistics.anchors))
        dim, d_model = statistics.rows.shape[1], self.rows.shape[1]
        basis = torch.randn(dim, d_model) / math.sqrt(dim * d_model)  # rows of mean square 1 get std 1/sqrt(D)
        with torch.no_grad():
            self.output_bias.copy_(torch.from_numpy(statistics.log_frequency))
            self.rows.copy_(torch.from_numpy(statistics.rows) @ basis)
            self.weights.copy_(torch.from_numpy(statistics.weights))

    def _turn_anchors(self) -> None:
        for level, users in enumerate(users_of(self.anchors, self.levels)):
            self.register_buffer(f"places_{level}", users.places, persistent=False)
            self.register_buffer(f"starts_{level}", users.starts, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._turn_anchors()

    def positions(self, ids: Tensor) -> Tensor:
        """Where ids stand in the table; ids below 0 (not scored) stay as they are."""
        return torch.where(ids < 0, ids, self.positions_of[ids.clamp(min=0)])

    def table(self, dtype: torch.dtype) -> Tensor:
        """All V rows in the order of their positions."""
        own = [self.rows.to(dtype), *(part.table(dtype) for part in (self.band, self.tail) if part is not None)]
        if not self.dense_rows:  # no anchors either
            return own[-1]
        users = [Users(getattr(self, f"places_{i}"), getattr(self, f"starts_{i}")) for i in range(len(self.levels) - 1)]
        return anchored_table(torch.cat(own), self.weights, self.anchors, self.levels, users)


def levels(dense_rows: int, vocab_size: int) -> list[int]:
    """Where the levels of an HTT table begin: at K, 2K, 4K, ... and, the last, the tail, at 8K; and where that ends, at V."""
    starts = [dense_rows * 2**j for j in range(TAIL_START.bit_length())] if dense_rows else [0]
    return [*(start for start in starts if start < vocab_size), vocab_size]


def anchor_count(rank: int, dense_rows: int) -> int:
    """Rows that each row past the dense ones is a sum of, of an HTT table of rank r."""
    return min(rank, dense_rows)
