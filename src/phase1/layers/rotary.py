"""Rotary position embedding: rotates pairs of channels by an angle that grows with the position."""

import torch
from torch import Tensor


def rotate(x: Tensor, start: int, base: float = 10000.0) -> Tensor:
    """Rotate channels (j, j + R/2) of position t by (start + t) · base^(-2j/R) radians.

    Args:
        x: (B, T, H, R), R even.
        start: position of the first row.
    Returns:
        The rotated tensor, shape and dtype of `x`.

    Source: Su et al. 2021, "RoFormer", section 3.2.
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = torch.arange(start, start + x.shape[1], device=x.device, dtype=wide)[:, None] * frequency
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)  # [T, 1, R/2]
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
