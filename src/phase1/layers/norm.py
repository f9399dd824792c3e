"""Root-mean-square normalisation in the type of its input."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last axis, times `weight` (last axis,): shape and dtype of `x`.

    Sums are at least float32 inside. Autocast is kept out: it would copy half-precision tensors to float32 and back.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
