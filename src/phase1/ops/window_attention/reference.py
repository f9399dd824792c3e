"""The definition of causal sliding-window attention: a dense, banded, row-stochastic matrix."""

import torch
from torch import Tensor


def check_arguments(q: Tensor, k: Tensor, x: Tensor, past: int, window: int) -> None:
    """Raise ValueError unless the shapes are those of `window_attention_reference`."""
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    if q.ndim != 4 or k.ndim != 4 or x.ndim != 4 or k.shape[:3] != x.shape[:3]:
        raise ValueError(
            f"q (B, T, H, R), k (B, past + T, H, R) and x (B, past + T, H, P) expected; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(x.shape)}"
        )
    if past < 0 or k.shape[1] != past + q.shape[1]:
        raise ValueError(f"k and x must hold past + T = {past} + {q.shape[1]} positions; got {k.shape[1]}")


def window_attention_matrix(q: Tensor, k: Tensor, past: int, window: int) -> Tensor:
    """M[t, s] = softmax_s(q_t · k_s / sqrt(R)) over past + t - window < s ≤ past + t: (B, H, T, past + T)."""
    t = torch.arange(q.shape[1], device=q.device)[:, None] + past
    s = torch.arange(k.shape[1], device=q.device)
    scores = torch.einsum("bthr,bshr->bhts", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill((s > t) | (s <= t - window), -torch.inf).softmax(-1)


def window_attention_reference(q: Tensor, k: Tensor, x: Tensor, *, window: int, past: int = 0) -> Tensor:
    """y_t = Σ_s softmax_s(q_t · k_s / sqrt(R)) x_s over the last `window` positions s, t included.

    Args:
        q: queries, (B, T, H, R).
        k, x: keys (B, past + T, H, R) and values (B, past + T, H, P): `past` positions precede the first query.
        window: w ≥ 1, positions attended to.
        past: positions of `k` and `x` before the first query.
    Returns:
        y: (B, T, H, P), dtype of `x`.
    Raises:
        ValueError: the shapes do not fit together, or window < 1.

    Source: Beltagy et al. 2020, "Longformer", section 3.1; as the banded term of a semiseparable operator, docs/design.md.
    """
    check_arguments(q, k, x, past, window)
    return torch.einsum("bhts,bshp->bthp", window_attention_matrix(q, k, past, window), x).to(x.dtype)
