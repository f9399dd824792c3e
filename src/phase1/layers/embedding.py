"""Token tables, tied to the output: a dense one, and HTT, whose rows cost less the rarer the token."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.ops.htt import Cores, htt_lookup, htt_table
from phase1.vocabulary import TokenStatistics

BAND_EDGES = (4, 16)  # bands of low rank end at these multiples of the dense rows
BAND_RANKS = (12, 4)  # their ranks, in multiples of the tail's rank r


class DenseTable(nn.Module):
    """One row of width D per token; the position of a token in the table is its id."""

    output_bias = None

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(vocab_size, d_model) / math.sqrt(d_model))

    def positions(self, ids: Tensor) -> Tensor:
        return ids

    def lookup(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.rows)

    def table(self, dtype: torch.dtype) -> Tensor:
        """All rows; a parameter, so in its own dtype: the ops cast it."""
        return self.rows


class LowRankBand(nn.Module):
    """Rows coefficients @ basis, (n, k) @ (k, D): a tensor train whose second vocabulary core has one slot.

    `start` (n, ≥ k), rows of mean square 1, gives the coefficients; either way rows start with std 1/sqrt(D).
    """

    def __init__(self, n: int, d_model: int, rank: int, start: Tensor | None) -> None:
        super().__init__()
        self.n = n
        coefficients = torch.randn(n, rank) if start is None else F.rms_norm(start[:, :rank], (rank,), eps=1e-12)
        self.coefficients = nn.Parameter(coefficients / math.sqrt(d_model))
        self.basis = nn.Parameter(torch.randn(rank, d_model) / math.sqrt(rank))

    def lookup(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.coefficients) @ self.basis

    def table(self, dtype: torch.dtype) -> Tensor:
        return self.coefficients.to(dtype) @ self.basis.to(dtype)


class TensorTrainTail(nn.Module):
    """n rows as a holographic tensor train of r terms on a grid of `groups` x ceil(n / groups) (ops/htt/reference.py)."""

    def __init__(self, n: int, d_model: int, rank: int, groups: int) -> None:
        super().__init__()
        self.n = n
        v1 = min(groups, n)
        v2 = math.ceil(n / v1)
        d1 = max(d for d in range(1, math.isqrt(d_model) + 1) if d_model % d == 0)
        std = (d_model * rank / 2) ** -0.25  # a cosine has mean square 1/2: rows start with std 1/sqrt(D)
        self.core_a = nn.Parameter(torch.randn(v1, rank, d1) * std)
        self.core_b = nn.Parameter(torch.randn(v2, rank, d_model // d1) * std)
        self.phase_a = nn.Parameter(torch.rand(v1, rank) * 2 * math.pi)
        self.phase_b = nn.Parameter(torch.rand(v2, rank) * 2 * math.pi)
        self.bias_b = nn.Parameter(torch.zeros(v2, d_model))  # b1 is the group's centroid, which the whole table shares

    @property
    def cores(self) -> Cores:
        return Cores(self.core_a, self.core_b, self.phase_a, self.phase_b, None, self.bias_b)

    def lookup(self, positions: Tensor) -> Tensor:
        return htt_lookup(positions, self.cores)

    def table(self, dtype: torch.dtype) -> Tensor:
        return htt_table(self.cores, dtype)[: self.n]


class HTTTable(nn.Module):
    """Rows by frequency: K dense ones, bands of rank 12r up to 4K and 4r up to 16K, the tail a tensor train of r terms.

    Every row past K also has the centroid of its group, every token an output bias.

    Args:
        vocab_size, d_model: V and D.
        rank: r, of the tail; bands have multiples of it, at most D.
        dense_rows: K.
        groups: centroids, and v1 of the tail's grid.
        statistics: order, frequencies, groups and starting vectors from the training text; ids in order and random if None.
    """

    positions_of: Tensor
    group_of: Tensor

    def __init__(
        self, vocab_size: int, d_model: int, rank: int, dense_rows: int, groups: int, statistics: TokenStatistics | None = None
    ) -> None:
        super().__init__()
        self.dense_rows = dense_rows
        self.register_buffer("positions_of", torch.arange(vocab_size))
        self.register_buffer("group_of", torch.arange(vocab_size - dense_rows) * groups // max(1, vocab_size - dense_rows))
        self.rows = nn.Parameter(torch.randn(dense_rows, d_model) / math.sqrt(d_model))
        self.centroids = nn.Parameter(torch.zeros(groups, d_model))
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        vectors = None if statistics is None else torch.from_numpy(statistics.vectors)
        self.parts, start = nn.ModuleList(), dense_rows
        for edge, multiple in zip(BAND_EDGES, BAND_RANKS, strict=True):
            end = min(edge * dense_rows, vocab_size)
            if end > start:
                width = min(multiple * rank, d_model)
                band = LowRankBand(end - start, d_model, width, None if vectors is None else vectors[start:end])
                self.parts.append(band)
                start = end
        if vocab_size > start:
            self.parts.append(TensorTrainTail(vocab_size - start, d_model, rank, groups))
        if statistics is not None:
            self._use(statistics)

    def _use(self, statistics: TokenStatistics) -> None:
        positions = torch.from_numpy(statistics.positions)
        if not torch.equal(positions.sort().values, self.positions_of):
            raise ValueError(f"positions must hold 0 to {len(self.positions_of) - 1} once each; they do not")
        self.positions_of.copy_(positions)
        self.group_of.copy_(torch.from_numpy(statistics.groups)[self.dense_rows :])
        with torch.no_grad():
            self.output_bias.copy_(torch.from_numpy(statistics.log_frequency))

    def positions(self, ids: Tensor) -> Tensor:
        """Where ids stand in the table; ids below 0 (not scored) stay as they are."""
        return torch.where(ids < 0, ids, self.positions_of[ids.clamp(min=0)])

    def lookup(self, positions: Tensor) -> Tensor:
        """Rows (*, D) of the positions asked for; no other row is made."""
        past = (positions - self.dense_rows).clamp(min=0)
        rows = F.embedding(self.group_of[past], self.centroids)
        for start, end, part in self._spans():
            inside = (positions >= start) & (positions < end)
            rows = rows + part.lookup(torch.where(inside, positions - start, 0)) * inside[..., None]
        if not self.dense_rows:
            return rows
        dense = F.embedding(positions.clamp(max=self.dense_rows - 1), self.rows)
        return torch.where((positions < self.dense_rows)[..., None], dense, rows)

    def table(self, dtype: torch.dtype) -> Tensor:
        """All V rows in the order of their positions."""
        rows = torch.cat([part.table(dtype) for _, _, part in self._spans()]) + self.centroids.to(dtype)[self.group_of]
        return torch.cat([self.rows.to(dtype), rows])

    def _spans(self) -> Iterator[tuple[int, int, LowRankBand | TensorTrainTail]]:
        """First position, end and part of each stretch past the dense rows."""
        start = self.dense_rows
        for part in self.parts:
            assert isinstance(part, LowRankBand | TensorTrainTail)
            yield start, start + part.n, part
            start += part.n
