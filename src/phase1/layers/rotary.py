"""Rotary position embedding: rotates pairs of channels by an angle that grows with the position."""

import torch
from torch import Tensor


def rotary(x: Tensor, start: int | Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines that `rotate` needs for the positions of `x` (B, T, H, R), R even: (T, 1, R) each, dtype of `x`.

    The angle of channels j and j + R/2 at position t is (start + t) · base^(-2j/R) radians; the sines of the first half
    have the sign of a rotation.

    Source: Su et al. 2021, "RoFormer", section 3.2.
    """
    half = x.shape[-1] // 2
    exact = {"device": x.device, "dtype": torch.float64}  # in float32 the angles of far positions are off by their rounding
    frequency = base ** (torch.arange(half, **exact) / -half)
    position = start + torch.arange(x.shape[1], **exact)
    angle = position[:, None, None] * torch.cat([-frequency, frequency])
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels (j, j + R/2) of every position of `x` (B, T, H, R) by the angles of `rotary`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
