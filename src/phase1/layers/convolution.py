"""The causal depthwise convolution over a few positions that a mixer applies to its projected input."""

import torch
import torch.nn.functional as F
from torch import Tensor

CONV_WIDTH = 4  # taps


def first_taps(channels: int) -> Tensor:
    """(CONV_WIDTH, channels), uniform in ±1/sqrt(CONV_WIDTH), as torch.nn.Conv1d starts."""
    return torch.empty(CONV_WIDTH, channels).uniform_(-(CONV_WIDTH**-0.5), CONV_WIDTH**-0.5)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = bias + Σ_j weight[j] ⊙ x_{t - CONV_WIDTH + 1 + j}, (B, T, channels), and the last inputs, for later positions.

    `past`: the (B, CONV_WIDTH - 1, channels) inputs before x, zeros if None; weight and bias are taken in the dtype of x.
    """
    T = x.shape[1]
    x = F.pad(x, (0, 0, CONV_WIDTH - 1, 0)) if past is None else torch.cat([past, x], 1)
    y, taps = bias.to(x.dtype), weight.to(x.dtype)
    for j in range(CONV_WIDTH):
        y = torch.addcmul(y, x[:, j : j + T], taps[j])
    return y, x[:, T:]
