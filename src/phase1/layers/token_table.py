"""Token tables, tied to the output: a dense one, and HTT, whose rows past the frequent ones cost a few numbers each."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.layers.two_level import Groups
from phase1.ops.anchored_table import Users, anchored_table, users_of
from phase1.ops.htt import Cores, htt_table
from phase1.vocabulary.levels import Level, levels
from phase1.vocabulary.statistics import TokenStatistics, TokenVectors


class DenseTable(nn.Module):
    """One row of width D per token; the position of a token in the table is its id.

    Args:
        vocab_size, d_model: V and D.
        output_bias: whether every token has one, as in HTT.
        vectors: of the training text, where rows and biases start; None: random rows, biases of 0.
    """

    def __init__(self, vocab_size: int, d_model: int, output_bias: bool = False, vectors: TokenVectors | None = None) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(vocab_size, d_model) / math.sqrt(d_model))
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        if self.output_bias is not None and vectors is not None:
            with torch.no_grad():
                self.output_bias.copy_(torch.from_numpy(vectors.log_frequency))
                self.rows.copy_(_to_width(torch.from_numpy(vectors.rows) * (1 / math.sqrt(vectors.rows.shape[1])), d_model))

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Make every row `factor` times as long."""
        self.rows.mul_(factor)

    def positions(self, ids: Tensor) -> Tensor:
        return ids

    def table(self, dtype: torch.dtype) -> Tensor:
        """All rows; a parameter, so in its own dtype: the ops cast it."""
        return self.rows

    def factors(self, hidden: Tensor, table: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The output, hidden (N, D) times the `table` of this."""
        return [(hidden, table)]


class CoordinateBand(nn.Module):
    """Rows that live on the leading ρ coordinates of the states and are 0 elsewhere, on fewer for rarer tokens."""

    def __init__(self, levels: Sequence[Level], d_model: int) -> None:
        super().__init__()
        self.n = levels[-1].end - levels[0].start
        self.coordinates = nn.ParameterList(
            torch.randn(level.end - level.start, level.rank) * _start_std(level, d_model) * math.sqrt(d_model / level.rank)
            for level in levels
        )

    @torch.no_grad()
    def start_at(self, rows: Tensor) -> None:
        """Start at `rows` (n, m), as far as their coordinates and those of this reach."""
        for part, start in zip(self.coordinates, rows.split([len(part) for part in self.coordinates]), strict=True):
            part.copy_(_to_width(start, part.shape[1]))

    def factors(self, hidden: Tensor, parts: int) -> list[tuple[Tensor, Tensor]]:
        """Output of the first `parts` stretches of rows: the coordinates of `hidden` (…, D) that they have, and theirs."""
        return [(hidden[..., : part.shape[1]], part) for part in list(self.coordinates)[:parts]]


class TensorTrainTail(nn.Module):
    """n rows as a holographic tensor train of r terms on a grid of `groups` x ceil(n / groups) (ops/htt/reference.py)."""

    def __init__(self, level: Level, d_model: int, rank: int, groups: int) -> None:
        super().__init__()
        self.n = n = level.end - level.start
        v1 = min(groups, n)
        self.members = v2 = math.ceil(n / v1)  # rows of a group
        d1 = max(d for d in range(1, math.isqrt(d_model) + 1) if d_model % d == 0)
        start = (_start_std(level, d_model) ** 2 * 2 / rank) ** 0.25  # a cosine has mean square 1/2
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


class OutputLevels(NamedTuple):
    """A two-level output: of the first level factors and bias, of the second the groups and the tail's rows and biases."""

    factors: list[tuple[Tensor, Tensor]]
    bias: Tensor
    groups: Groups
    tail: Tensor
    tail_bias: Tensor


class HTTTable(nn.Module):
    """K dense rows for frequent tokens, rows of falling rank for others, a tensor train for rare ones; from 4K on, sums too.

    E_i = (i ≥ 4K: Σ_j w_ij E_a_ij) + (K ≤ i < 16K: c_i in the first ρ_i coordinates; above: tensor train of 2r terms)

    The rank ρ is 11r, 8r, 6r and 3r, D at most, from K, 2K, 4K and 8K on (`levels`). The 3r/8 anchors a_ij are rows that are
    used like i, of an earlier level, so the table is made level by level. Every token also has an output bias.

    Args:
        vocab_size, d_model: V and D.
        rank: r.
        dense_rows: K.
        groups: v1 of the tail's grid.
        statistics: of the training text: order, frequencies, anchors, where rows start; None: ids in order, all random.
        two_level: the output is of two levels: over the rows before the tail and its groups, then inside a group.
    """

    positions_of: Tensor
    anchors: Tensor

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        rank: int,
        dense_rows: int,
        groups: int,
        statistics: TokenStatistics | None = None,
        two_level: bool = False,
    ) -> None:
        super().__init__()
        every = levels(vocab_size, d_model, rank, dense_rows)
        self.levels = [*(level.start for level in every if level.anchors), vocab_size]
        k = every[-1].anchors
        self.register_buffer("positions_of", torch.arange(vocab_size))
        anchors = [torch.randint(level.start, (level.end - level.start, k)) for level in every if level.anchors]
        self.register_buffer("anchors", torch.cat([torch.empty(0, k, dtype=torch.int64), *anchors]))
        self.rows = nn.Parameter(torch.randn(dense_rows, d_model) / math.sqrt(d_model))
        self.weights = nn.Parameter(torch.randn(len(self.anchors), k) / math.sqrt(max(1, k)))
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        band, tail = [level for level in every if level.rank], [level for level in every if not level.rank]
        self.band = CoordinateBand(band, d_model) if band else None
        self.tail = TensorTrainTail(tail[0], d_model, 2 * rank, groups) if tail else None
        self.plain = sum(not level.anchors for level in band)  # levels of rows without anchors
        self.groups: Groups | None = None
        if two_level:
            if self.tail is None:
                raise ValueError(f"a two-level output needs a tail, V > 16 x K = {16 * dense_rows}; got V={vocab_size}")
            self.groups = Groups(self.tail.n, self.tail.members, d_model)
        if statistics is not None:
            self._use(statistics)
        self.turn_anchors()

    def _use(self, statistics: TokenStatistics) -> None:
        positions = torch.from_numpy(statistics.positions)
        if not torch.equal(positions.sort().values, self.positions_of):
            raise ValueError(f"positions must hold 0 to {len(self.positions_of) - 1} once each; they do not")
        self.positions_of.copy_(positions)
        self.anchors.copy_(torch.from_numpy(statistics.anchors))
        scale = 1 / math.sqrt(statistics.rows.shape[1])  # vectors of mean square 1 get the norm of a dense row
        with torch.no_grad():
            self.output_bias.copy_(torch.from_numpy(statistics.log_frequency))
            self.rows.copy_(_to_width(torch.from_numpy(statistics.rows) * scale, self.rows.shape[1]))
            self.weights.copy_(torch.from_numpy(statistics.weights))
        if self.band is not None:
            self.band.start_at(torch.from_numpy(statistics.rest[: self.band.n]) * scale)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Make every row `factor` times as long: rows are linear in these, and a sum of anchors in them."""
        linear = [self.rows, *([] if self.band is None else self.band.coordinates)]
        linear += [] if self.tail is None else [self.tail.core_a, self.tail.bias_b]
        for parameter in linear:
            parameter.mul_(factor)

    def turn_anchors(self) -> None:
        """Find who uses each row, again whenever the anchors have changed."""
        for name, users in users_of(self.anchors, self.levels)._asdict().items():
            self.register_buffer(f"users_{name}", users, persistent=False)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if wrong := self.index_out_of_range():
            errors.append(f"{prefix}{wrong}")
        else:
            self.turn_anchors()

    def index_out_of_range(self) -> str | None:
        """What a row index is that no row has: on a GPU it would read foreign memory. None where there are no numbers yet."""
        if self.positions_of.is_meta:
            return None
        every = torch.arange(len(self.positions_of), device=self.positions_of.device)
        if not torch.equal(self.positions_of.sort().values, every):
            return f"positions_of must hold 0 to {len(self.positions_of) - 1} once each"
        for start, end in pairwise(self.levels):
            level = self.anchors[start - self.levels[0] : end - self.levels[0]]
            if level.numel() and not 0 <= level.min() <= level.max() < start:
                return f"anchors of rows {start} to {end - 1} must be between 0 and {start - 1}"
        return None

    def positions(self, ids: Tensor) -> Tensor:
        """Where ids stand in the table; ids below 0 (not scored) stay as they are."""
        return torch.where(ids < 0, ids, self.positions_of[ids.clamp(min=0)])

    def table(self, dtype: torch.dtype) -> Tensor:
        """All V rows in the order of their positions."""
        own = [self.rows, *(self.band.coordinates if self.band else ()), *([self.tail.table(dtype)] if self.tail else ())]
        if not len(self.anchors):
            return own[-1].to(dtype)
        users = Users(*(getattr(self, f"users_{name}") for name in Users._fields))
        return anchored_table(own, self.weights, self.anchors, self.levels, users, dtype)

    def factors(self, hidden: Tensor, table: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The output, hidden (N, D) times the `table` of this; rows without anchors by their coefficients, which are fewer."""
        if not self.plain:
            return [(hidden, table)]
        assert self.band is not None
        return [(hidden, self.rows), *self.band.factors(hidden, self.plain), (hidden, table[self.levels[0] :])]

    def levels_of_output(self, hidden: Tensor, table: Tensor) -> OutputLevels:
        """The two levels, for hidden (N, D) and the `table` of this."""
        assert self.groups is not None
        sizes = [len(table) - self.groups.n, self.groups.n]
        (before, tail), (bias, tail_bias) = table.split(sizes), self.output_bias.split(sizes)
        rows, group_bias = self.groups.first_level(tail, tail_bias)
        stretches, first = [], 0
        if self.plain:
            assert self.band is not None
            stretches, first = [(hidden, self.rows), *self.band.factors(hidden, self.plain)], self.levels[0]
        stretches.append((hidden, torch.cat([before[first:], rows])))
        return OutputLevels(stretches, torch.cat([bias, group_bias]), self.groups, tail, tail_bias)


def _start_std(level: Level, d_model: int) -> float:
    """Of the part of a row that is its own: that of a dense row, a tenth of it next to anchors, of which it is a correction."""
    return (0.1 if level.anchors else 1.0) / math.sqrt(d_model)


def _to_width(rows: Tensor, width: int) -> Tensor:
    """`rows` (n, m) with the coordinates that are missing as zeros, or without those that are too many."""
    return F.pad(rows, (0, width - rows.shape[1]))
