"""The holographic tensor train as batched matmuls, after the cosine is expanded into an ordinary train of rank 2r."""

import torch
from torch import Tensor

from phase1.ops.htt.reference import Cores


def _expand(cores: Cores) -> tuple[Tensor, Tensor]:
    """cos(φ1 + φ2) = cos φ1 cos φ2 - sin φ1 sin φ2: cores (v1, 2r, d1) and (v2, 2r, d2) without phases."""
    cos_a, sin_a = cores.phase_a.cos()[..., None], cores.phase_a.sin()[..., None]
    cos_b, sin_b = cores.phase_b.cos()[..., None], cores.phase_b.sin()[..., None]
    return torch.cat([cores.a * cos_a, -cores.a * sin_a], 1), torch.cat([cores.b * cos_b, cores.b * sin_b], 1)


def htt_table(cores: Cores, dtype: torch.dtype) -> Tensor:
    """All rows, (v1·v2, d1·d2), computed and returned in `dtype`; the operand of the tied output."""
    a, b = (core.to(dtype) for core in _expand(cores))
    (v1, _, d1), (v2, _, d2) = a.shape, b.shape
    table = a.transpose(1, 2).flatten(0, 1) @ b.transpose(0, 1).flatten(1)  # [v1·d1, v2·d2]
    table = table.view(v1, d1, v2, d2).transpose(1, 2).reshape(v1, v2, d1 * d2)
    for bias, axis in ((cores.bias_a, 1), (cores.bias_b, 0)):
        table = table if bias is None else table + bias.to(dtype).unsqueeze(axis)
    return table.flatten(0, 1)
