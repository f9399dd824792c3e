"""The holographic tensor train as batched matmuls, after the cosine is expanded into an ordinary train of rank 2r."""

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.htt.reference import Cores


def _expand(cores: Cores) -> tuple[Tensor, Tensor]:
    """cos(φ1 + φ2) = cos φ1 cos φ2 - sin φ1 sin φ2: cores (v1, 2r, d1) and (v2, 2r, d2) without phases."""
    cos_a, sin_a = cores.phase_a.cos()[..., None], cores.phase_a.sin()[..., None]
    cos_b, sin_b = cores.phase_b.cos()[..., None], cores.phase_b.sin()[..., None]
    return torch.cat([cores.a * cos_a, -cores.a * sin_a], 1), torch.cat([cores.b * cos_b, cores.b * sin_b], 1)


def htt_lookup(positions: Tensor, cores: Cores) -> Tensor:
    """Fast form of `htt_lookup_reference`; a position that is no row is an error of the index, not a ValueError.

    Only the rows asked for are ever made; reading the range of `positions` would stall a GPU, so callers check ids.
    """
    a, b = _expand(cores)
    i1, i2 = positions // cores.b.shape[0], positions % cores.b.shape[0]
    rows = torch.einsum("...ra,...rb->...ab", _pick(a, i1), _pick(b, i2)).flatten(-2)
    for bias, index in ((cores.bias_a, i1), (cores.bias_b, i2)):
        rows = rows if bias is None else rows + F.embedding(index, bias)
    return rows


def _pick(core: Tensor, index: Tensor) -> Tensor:
    """core[index], by `embedding`: the gradient of plain indexing is many times slower where an index repeats."""
    return F.embedding(index, core.flatten(1)).unflatten(-1, core.shape[1:])


def htt_table(cores: Cores, dtype: torch.dtype) -> Tensor:
    """All rows, (v1·v2, d1·d2), computed and returned in `dtype`; the operand of the tied output."""
    a, b = (core.to(dtype) for core in _expand(cores))
    (v1, _, d1), (v2, _, d2) = a.shape, b.shape
    table = a.transpose(1, 2).flatten(0, 1) @ b.transpose(0, 1).flatten(1)  # [v1·d1, v2·d2]
    table = table.view(v1, d1, v2, d2).transpose(1, 2).reshape(v1, v2, d1 * d2)
    for bias, axis in ((cores.bias_a, 1), (cores.bias_b, 0)):
        table = table if bias is None else table + bias.to(dtype).unsqueeze(axis)
    return table.flatten(0, 1)
