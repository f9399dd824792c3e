"""The holographic tensor train as batched matmuls, after the cosine and the bias are expanded into an ordinary train."""

import torch
from torch import Tensor

from phase1.ops.htt.reference import Cores


def _expand(cores: Cores) -> tuple[Tensor, Tensor]:
    """Cores (v1, R, d1) and (v2, R, d2) of an ordinary train without phases and bias.

    cos(φ1 + φ2) = cos φ1 cos φ2 - sin φ1 sin φ2 makes two terms of each; the bias is d1 more, with 1 in the other core: the
    product adds it in float32, and no pass over the table does.
    """
    cos_a, sin_a = cores.phase_a.cos()[..., None], cores.phase_a.sin()[..., None]
    cos_b, sin_b = cores.phase_b.cos()[..., None], cores.phase_b.sin()[..., None]
    a, b = [cores.a * cos_a, -cores.a * sin_a], [cores.b * cos_b, cores.b * sin_b]
    (v1, _, d1), (v2, _, d2) = cores.a.shape, cores.b.shape
    if cores.bias_b is not None:
        a.append(torch.eye(d1, dtype=cores.a.dtype, device=cores.a.device).expand(v1, d1, d1))
        b.append(cores.bias_b.view(v2, d1, d2))
    return torch.cat(a, 1), torch.cat(b, 1)


def htt_table(cores: Cores, dtype: torch.dtype, n: int | None = None) -> Tensor:
    """All rows, (v1·v2, d1·d2), or the first `n`, computed and returned in `dtype`; the operand of the tied output."""
    a, b = (core.to(dtype) for core in _expand(cores))
    (v1, _, d1), (v2, _, d2) = a.shape, b.shape
    product = a.transpose(1, 2).flatten(0, 1) @ b.transpose(0, 1).flatten(1)  # [v1·d1, v2·d2]
    return product.view(v1, d1, v2, d2).transpose(1, 2).reshape(v1 * v2, d1 * d2)[:n]
