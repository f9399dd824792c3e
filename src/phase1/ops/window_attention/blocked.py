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
    q = (F.pad(q, (0, 0, 0, 0, 0, fill)) if fill else q).unflatten(1, (-1, block))  # [B, N, C, H, R]
    k, x = (_spans(tensor, window, block) for tensor in (k, x))  # [B, N, w + C, H, ·]
    seen = torch.ones(block, window + block, dtype=torch.bool, device=q.device).triu(1).tril(window)
    seen = seen.repeat(*q.shape[:2], 1, 1, 1)  # [B, N, 1, C, w + C]
    seen[:, 0, :, :, : window - keep] = False  # the filling on the left
    batch = [tensor.flatten(0, 1).transpose(1, 2).to(x.dtype) for tensor in (q, k, x)]  # [B·N, H, ·, ·]
    y = F.scaled_dot_product_attention(batch[0], batch[1], batch[2], attn_mask=seen.flatten(0, 1))
    return y.transpose(1, 2).unflatten(0, q.shape[:2]).flatten(1, 2)[:, :T]


def _spans(tensor: Tensor, window: int, block: int) -> Tensor:
    """(B, w + N·C, H, ·) -> (B, N, w + C, H, ·): the positions each block of C queries can see."""
    if block == window:  # two neighbouring blocks; a plain copy, whose backward is cheaper than that of unfold
        blocks = tensor.unflatten(1, (-1, block))
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2)
    return tensor.unfold(1, window + block, block).movedim(-1, 2)
