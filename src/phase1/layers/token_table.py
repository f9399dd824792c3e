"""Token tables, used for input and output: a dense one, and HTT, in which a rare token costs a few numbers."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1.layers.two_level import Groups
from phase1.ops.anchored_table import InverseIndex, anchored_table, inverse_index
from phase1.ops.cross_entropy import ALIGNMENT
from phase1.ops.htt import Cores, htt_table
from phase1.vocabulary.levels import Level, levels
from phase1.vocabulary.statistics import TokenStatistics, TokenVectors

GROUP_RANK = 4  # of what a two-level output learns besides, as a multiple of r: 90 % of a dense table are saved with it


class DenseTable(nn.Module):
    """One row of width D per token; the row of a token is its id.

    Args:
        vocab_size, d_model: V and D.
        output_bias: give every token a bias in the output, as HTT does.
        vectors: start rows and biases from these, computed from the training text; None: random rows, biases of 0.
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

    def rows_of(self, ids: Tensor) -> Tensor:
        """The row of each id: the id itself."""
        return ids

    def table(self, dtype: torch.dtype) -> Tensor:
        """All rows (V, D): the parameter itself, not cast to `dtype`, which the operators do."""
        return self.rows

    def table_of_loss(self, dtype: torch.dtype) -> Tensor:
        """The table as the loss takes it."""
        return self.table(dtype)


class CoordinateBand(nn.Module):
    """Rows that are zero past their first ρ coordinates, with a smaller ρ for each level of rarer tokens."""

    def __init__(self, levels: Sequence[Level], d_model: int) -> None:
        super().__init__()
        self.n = levels[-1].end - levels[0].start
        self.coordinates = nn.ParameterList(
            torch.randn(level.end - level.start, level.rank) * _start_std(level, d_model) * math.sqrt(d_model / level.rank)
            for level in levels
        )

    @torch.no_grad()
    def start_at(self, rows: Tensor) -> None:
        """Set the coefficients to the first ρ coordinates of `rows` (n, m), with zeros if m is smaller."""
        for part, start in zip(self.coordinates, rows.split([len(part) for part in self.coordinates]), strict=True):
            part.copy_(_to_width(start, part.shape[1]))


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
        """The parameters as the operator takes them."""
        return Cores(self.core_a, self.core_b, self.phase_a, self.phase_b, self.bias_b)

    def table(self, dtype: torch.dtype) -> Tensor:
        """All rows, (n, D); the grid may have a few more."""
        return htt_table(self.cores, dtype, self.n)


class OutputLevels(NamedTuple):
    """What the two softmaxes of a two-level output are computed from."""

    rows: Tensor  # first level: the rows before the tail, then one a group, (V - n + G, D)
    bias: Tensor  # first level
    groups: Groups  # second level
    tail: Tensor  # second level: the rows inside the groups, (n, D)
    tail_bias: Tensor  # second level: (n,)


class HTTTable(nn.Module):
    """A table whose rows, sorted by frequency, cost fewer numbers the rarer their tokens are.

    Row i, with K = dense_rows (8K is eight times K):
        i < K          D numbers
        K ≤ i < 16K    c_i, the first ρ coordinates; ρ is 11r, 8r, 6r and 3r from row K, 2K, 4K and 8K on, at most D
        16K ≤ i        a row of a holographic tensor train of 2r terms (ops/htt/reference.py)
        4K ≤ i         in addition Σ_j w_ij E_{a_ij}, a weighted sum of 3r/8 earlier rows, the anchors of row i

    The anchors belong to an earlier level than the row, so the table is built level by level. Every token has an output bias.

    Args:
        vocab_size, d_model: V and D.
        rank: r.
        dense_rows: K.
        groups: v1 of the tail's grid.
        statistics: of the training text: the order of rows, their frequencies, anchors and start; None: ids in order, random.
        two_level: make the output two softmaxes: over the rows before the tail and the tail's groups, then inside a group.
    """

    row_of_id: Tensor
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
        all_levels = levels(vocab_size, d_model, rank, dense_rows)
        self.levels = [*(level.start for level in all_levels if level.anchors), vocab_size]
        k = all_levels[-1].anchors
        self.register_buffer("row_of_id", torch.arange(vocab_size))
        anchors = [torch.randint(level.start, (level.end - level.start, k)) for level in all_levels if level.anchors]
        self.register_buffer("anchors", torch.cat([torch.empty(0, k, dtype=torch.int64), *anchors]))
        self.rows = nn.Parameter(torch.randn(dense_rows, d_model) / math.sqrt(d_model))
        self.weights = nn.Parameter(torch.randn(len(self.anchors), k) / math.sqrt(max(1, k)))
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        band, tail = [level for level in all_levels if level.rank], [level for level in all_levels if not level.rank]
        self.band = CoordinateBand(band, d_model) if band else None
        self.tail = TensorTrainTail(tail[0], d_model, 2 * rank, groups) if tail else None
        self.groups: Groups | None = None
        if two_level:
            if self.tail is None:
                raise ValueError(f"a two-level output needs a tail, V > 16 x K = {16 * dense_rows}; got V={vocab_size}")
            self.groups = Groups(self.tail.n, self.tail.members, d_model, min(GROUP_RANK * rank, d_model))
        if statistics is not None:
            self._start_from(statistics)
        self.build_inverse_index()

    def _start_from(self, statistics: TokenStatistics) -> None:
        row_of_id = torch.from_numpy(statistics.row_of_id)
        if not torch.equal(row_of_id.sort().values, self.row_of_id):
            raise ValueError(f"row_of_id must hold 0 to {len(self.row_of_id) - 1} once each; it does not")
        self.row_of_id.copy_(row_of_id)
        self.anchors.copy_(torch.from_numpy(statistics.anchors))
        scale = 1 / math.sqrt(statistics.rows.shape[1])  # vectors of mean square 1 get the norm of a dense row
        with torch.no_grad():
            self.output_bias.copy_(torch.from_numpy(statistics.log_frequency))
            self.rows.copy_(_to_width(torch.from_numpy(statistics.rows) * scale, self.rows.shape[1]))
            self.weights.copy_(torch.from_numpy(statistics.weights))
        if self.band is not None:
            self.band.start_at(torch.from_numpy(statistics.residual[: self.band.n]) * scale)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Make every row `factor` times as long: rows are linear in these parameters, and sums of anchors in the rows."""
        linear = [self.rows, *([] if self.band is None else self.band.coordinates)]
        linear += [] if self.tail is None else [self.tail.core_a, self.tail.bias_b]
        for parameter in linear:
            parameter.mul_(factor)

    def build_inverse_index(self) -> None:
        """Recompute from `anchors` what the backward pass of the table needs; it is in no checkpoint."""
        for name, tensor in inverse_index(self.anchors, self.levels)._asdict().items():
            self.register_buffer(f"inverse_{name}", tensor, persistent=False)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if wrong := self.index_out_of_range():
            errors.append(f"{prefix}{wrong}")
        else:
            self.build_inverse_index()

    def index_out_of_range(self) -> str | None:
        """Say which row index is out of range (on a GPU it would read foreign memory); None if none is, or on a meta tensor."""
        if self.row_of_id.is_meta:
            return None
        all_rows = torch.arange(len(self.row_of_id), device=self.row_of_id.device)
        if not torch.equal(self.row_of_id.sort().values, all_rows):
            return f"row_of_id must hold 0 to {len(self.row_of_id) - 1} once each"
        for start, end in pairwise(self.levels):
            level = self.anchors[start - self.levels[0] : end - self.levels[0]]
            if level.numel() and not 0 <= level.min() <= level.max() < start:
                return f"anchors of rows {start} to {end - 1} must be between 0 and {start - 1}"
        return None

    def rows_of(self, ids: Tensor) -> Tensor:
        """The row of each id; ids below 0 (targets that are not scored) stay as they are."""
        return torch.where(ids < 0, ids, self.row_of_id[ids.clamp(min=0)])

    def table_of_loss(self, dtype: torch.dtype) -> Tensor:
        """The table as the loss takes it: with rows of zeros at its end, where a loss over all rows would else copy it."""
        return self.table(dtype, 0 if self.groups is not None else -len(self.row_of_id) % ALIGNMENT)

    def table(self, dtype: torch.dtype, zeros: int = 0) -> Tensor:
        """All rows, (V, D), the most frequent token's first, and rows of zeros after them."""
        own: list[Tensor] = [self.rows]  # by statements: PyTorch 2.11 compiles no list with a conditional part
        if self.band is not None:
            own += list(self.band.coordinates)
        if self.tail is not None:
            own.append(self.tail.table(dtype))
        if not len(self.anchors):
            return F.pad(own[-1].to(dtype), (0, 0, 0, zeros)) if zeros else own[-1].to(dtype)
        inverse = InverseIndex(*(getattr(self, f"inverse_{name}") for name in InverseIndex._fields))
        return anchored_table(own, self.weights, self.anchors, self.levels, inverse, dtype, zeros)

    def levels_of_output(self, table: Tensor) -> OutputLevels:
        """The operands of both softmaxes, for `table()` (V, D)."""
        assert self.groups is not None
        sizes = [len(table) - self.groups.n, self.groups.n]
        (before, tail), (bias, tail_bias) = table.split(sizes), self.output_bias.split(sizes)
        rows, group_bias = self.groups.first_level(tail, tail_bias)
        return OutputLevels(torch.cat([before, rows]), torch.cat([bias, group_bias]), self.groups, tail, tail_bias)


def _start_std(level: Level, d_model: int) -> float:
    """Initial std of a row's own part: 1/√D, a tenth of that if the row also has anchors, whose sum it then only corrects."""
    return (0.1 if level.anchors else 1.0) / math.sqrt(d_model)


def _to_width(rows: Tensor, width: int) -> Tensor:
    """`rows` (n, m) padded with zeros or cut to (n, width)."""
    return F.pad(rows, (0, width - rows.shape[1]))
