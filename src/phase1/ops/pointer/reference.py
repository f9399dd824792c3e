"""The definition of the pointer: a banded, row-stochastic matrix, and its weight on the positions that hold the target."""

import torch
from torch import Tensor


def check_arguments(q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, past: int, window: int) -> None:
    """Raise ValueError unless the shapes are those of `pointer_log_probability_reference`."""
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    if q.ndim != 3 or k.ndim != 3 or not bias.shape == ids.shape == k.shape[:2] or targets.shape != q.shape[:2]:
        raise ValueError(
            "q (B, T, d), k (B, past + T, d), bias and ids (B, past + T) and targets (B, T) expected; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(bias.shape)}, {tuple(ids.shape)} and {tuple(targets.shape)}"
        )
    if past < 0 or k.shape[1] != past + q.shape[1]:
        raise ValueError(f"k, bias and ids must hold past + T = {past} + {q.shape[1]} positions; got {k.shape[1]}")


def pointer_matrix(q: Tensor, k: Tensor, bias: Tensor, past: int, window: int) -> Tensor:
    """log of a[t, s] = softmax_s(q_t · k_s / sqrt(d) + bias_s) over past + t - window < s ≤ past + t: (B, T, past + T)."""
    scores = (q @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5 + bias[:, None]
    if q.shape[1] == 1 and past < window:  # sees every key: a step of generation makes no mask
        return scores.log_softmax(-1)
    t = torch.arange(q.shape[1], device=q.device)[:, None] + past
    s = torch.arange(k.shape[1], device=q.device)
    return scores.masked_fill((s > t) | (s <= t - window), -torch.inf).log_softmax(-1)


def pointer_log_probability_reference(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, *, window: int, past: int = 0
) -> Tensor:
    """log Σ_s a_ts [ids_s = target_t], a_ts = softmax_s(q_t · k_s / sqrt(d) + bias_s), over the last w positions.

    Args:
        q: queries, (B, T, d).
        k, bias, ids: keys (B, past + T, d), what their scores have added, at least float32, and tokens ≥ 0, both
            (B, past + T): `past` positions precede the first query.
        targets: (B, T) tokens; a negative number is no token.
        window: w ≥ 1, positions pointed to, t among them.
        past: positions of `k`, `bias` and `ids` before the first query.
    Returns:
        (B, T), at least float32; -inf, without a gradient, where no position that is seen holds the target.
    Raises:
        ValueError: the shapes do not fit together, or window < 1.

    Source: See et al. 2017, "Get to the point", equation 9; Merity et al. 2017, "Pointer sentinel mixture models", section 2.
    """
    check_arguments(q, k, bias, ids, targets, past, window)
    log_a = pointer_matrix(q, k, bias, past, window)
    match = (targets[:, :, None] == ids[:, None, :]) & log_a.isfinite()
    found = match.any(-1)
    log_a = log_a.where(match | ~found[..., None], -torch.inf)  # all of a row where none matches: no gradient of -inf alone
    return log_a.logsumexp(-1).where(found, -torch.inf)
