"""Sliding-window attention in blocks of w queries against 2w keys: O(T·w) time and memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.window_attention.reference import check_arguments


def window_attention(q: Tensor, k: Tensor, x: Tensor, *, window: int, past: int = 0) -> Tensor:
    """Fast form of `window_attention_reference`: same arguments, result, gradients and errors."""
    check_arguments(q, k, x, past, window)
    T = q.shape[1]
    if T == 0:
        return x[:, :0]
    window = min(window, past + T)  # there is nothing older, and no memory is taken for it
    block = min(window, T)
    fill = -T % block
    keep = min(past, window)  # older positions are out of every query's window
    k, x = (F.pad(tensor[:, past - keep :], (0, 0, 0, 0, window - keep, fill)) for tensor in (k, x))
    q = F.pad(q, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)  # [B, H, N, C, R]
    k, x = (_spans(tensor, window, block) for tensor in (k, x))  # [B, H, N, w + C, ·]
    row = torch.arange(block, device=q.device)[:, None]
    column = torch.arange(window + block, device=q.device)
    first = torch.arange(q.shape[2], device=q.device)[:, None, None] * block  # [N, 1, 1] where each span begins
    hidden = (column <= row) | (column > row + window) | (first + column < window - keep)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(x.dtype, torch.float32)) * q.shape[-1] ** -0.5
    y = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype) @ x
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2)


def _spans(tensor: Tensor, window: int, block: int) -> Tensor:
    """(B, w + N·C, H, ·) -> (B, H, N, w + C, ·): the positions each block of C queries can see."""
    if block == window:  # two neighbouring blocks; a plain copy, whose backward is cheaper than that of unfold
        blocks = tensor.unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)
        return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], 3)
    return tensor.unfold(1, window + block, block).permute(0, 2, 1, 4, 3)
