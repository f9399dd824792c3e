"""The definition of the semiseparable operator: a recurrence, and the dense matrix it equals."""

import torch
from torch import Tensor


def check_arguments(u: Tensor, v: Tensor, x: Tensor, log_decay: Tensor, state: Tensor | None) -> None:
    """Raise ValueError unless the shapes are those of `semiseparable_reference`."""
    if u.ndim != 4 or u.shape != v.shape:
        raise ValueError(f"u and v must share one shape (B, T, H, R); got {tuple(u.shape)} and {tuple(v.shape)}")
    if x.ndim != 4 or x.shape[:3] != u.shape[:3]:
        raise ValueError(f"x must be (B, T, H, P) with (B, T, H) = {tuple(u.shape[:3])}; got {tuple(x.shape)}")
    if log_decay.shape != u.shape[:3]:
        raise ValueError(f"log_decay must be (B, T, H) = {tuple(u.shape[:3])}; got {tuple(log_decay.shape)}")
    expected = (u.shape[0], u.shape[2], u.shape[3], x.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state must be (B, H, R, P) = {expected}; got {tuple(state.shape)}")


def semiseparable_reference(
    u: Tensor, v: Tensor, x: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + v_t x_tᵀ,  y_t = S_tᵀ u_t, one position at a time.

    The definition, not the fast path: T sequential steps.

    Args:
        u, v: semiseparable factors, (B, T, H, R).
        x: values, (B, T, H, P).
        log_decay: log of the forgetting factor a_t, ≤ 0, (B, T, H).
        state: S before the first position, (B, H, R, P); zeros if None.
    Returns:
        y: (B, T, H, P), dtype of `x`; and the state after the last position, (B, H, R, P), at least float32.
    Raises:
        ValueError: the shapes do not fit together.

    Source: Dao and Gu 2024, "Transformers are SSMs", sections 3.2 and 6; the rank gate is inside u and v.
    """
    check_arguments(u, v, x, log_decay, state)
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, _, heads, rank = u.shape
    S = x.new_zeros(batch, heads, rank, x.shape[-1], dtype=wide) if state is None else state.to(wide)
    outputs = []
    for u_t, v_t, x_t, log_a in zip(*(tensor.to(wide).unbind(1) for tensor in (u, v, x, log_decay)), strict=True):
        S = log_a.exp()[..., None, None] * S + v_t[..., :, None] * x_t[..., None, :]  # [B, H, R, P]
        outputs.append((u_t[..., None] * S).sum(-2))
    return (torch.stack(outputs, 1) if outputs else x.to(wide)).to(x.dtype), S


def semiseparable_matrix(u: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """M[t, s] = (u_t · v_s) Π_{j=s+1..t} a_j for s ≤ t, else 0: the operator as a dense (B, H, T, T) matrix."""
    total = log_decay.cumsum(1).transpose(1, 2)  # [B, H, T]
    later = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=u.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    return torch.einsum("bthr,bshr->bhts", u, v) * decay
