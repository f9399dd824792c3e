"""Rotary position embedding: rotates pairs of channels by an angle that grows with the position."""

import torch
from torch import Tensor

from phase1.ops.rotary import rotary_angles, rotary_angles_reference


def rotary(x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines that `rotate` needs for the positions of `x` (B, T, H, R), R even: (T, 1, R) each, dtype of `x`.

    The angle of channels j and j + R/2 at position t is (start + t) · 10000^(-2j/R) radians; the sines of the first half
    have the sign of a rotation.

    Source: Su et al. 2021, "RoFormer", section 3.2.
    """
    fused = x.is_cuda and isinstance(start, int)  # a CUDA graph of a step gives a tensor, which it reads at every launch
    angles = rotary_angles if fused else rotary_angles_reference
    cos, sin = (part.to(x.dtype) for part in angles(x, x.shape[1], x.shape[-1] // 2, start))  # type: ignore[arg-type]
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels (j, j + R/2) of every position of `x` (B, T, H, R) by the angles of `rotary`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
