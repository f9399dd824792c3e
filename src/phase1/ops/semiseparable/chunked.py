"""The semiseparable operator as matmuls inside chunks and a short scan across them: O(T) time and memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.ops.semiseparable.reference import check_arguments

CHUNK = 64  # positions per chunk: scores cost T·CHUNK, states cost T/CHUNK·R·P; 64 balances them at R=32, P=64
GROUP = 64  # chunks per level of the scan across chunks: one level up to 4096 positions


def semiseparable(u: Tensor, v: Tensor, x: Tensor, log_decay: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fast form of `semiseparable_reference`: same arguments, result, gradients and errors."""
    check_arguments(u, v, x, log_decay, state)
    T, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    state = None if state is None else state.to(wide)
    if T == 0:
        return x, x.new_zeros(x.shape[0], x.shape[2], u.shape[-1], x.shape[-1], dtype=wide) if state is None else state
    chunk = min(CHUNK, T)
    u, v, x_, log_decay = (_chunks(tensor, chunk) for tensor in (u, v, x, log_decay[..., None]))  # [B, H, N, C, ·]
    log_decay = log_decay.squeeze(-1).to(wide)  # [B, H, N, C]
    total = log_decay.cumsum(-1)  # since the chunk began
    y = ((u @ v.transpose(-1, -2)) * _decays(log_decay)).to(x.dtype) @ x_
    to_end = F.pad(log_decay[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1)).exp()[..., None]
    added = (v * to_end).to(x.dtype).transpose(-1, -2) @ x_  # [B, H, N, R, P] what each chunk adds to the state
    with torch.autocast(x.device.type, enabled=False):
        before, last = _scan(added.to(wide), total[..., -1], state)
    y = y + (u * total.exp()[..., None]).to(x.dtype) @ before.to(x.dtype)
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2).to(x.dtype), last


def _chunks(tensor: Tensor, chunk: int) -> Tensor:
    """(B, T, H, ·) -> (B, H, N, C, ·), the last chunk filled with zeros, which add nothing and decay nothing."""
    if fill := -tensor.shape[1] % chunk:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, fill))
    return tensor.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()  # once, and not for every product


def _decays(log_decay: Tensor) -> Tensor:
    """D[t, s] = exp(log_decay_{s+1} + ... + log_decay_t) for s ≤ t, else 0: (..., C) -> (..., C, C).

    Every sum has its own terms only: as a difference of two longer ones it would lose its digits after a reset of -1,000.
    """
    C = log_decay.shape[-1]
    terms = torch.ones(C, C, dtype=torch.bool, device=log_decay.device).tril(-1)  # of column s those after s
    sums = log_decay[..., :, None].expand(*log_decay.shape, C).masked_fill(~terms, 0).cumsum(-2)
    return sums.masked_fill(terms.T, -torch.inf).exp()


def _scan(added: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_{n+1} = exp(log_decay_n) S_n + added_n from S_0 = `state`: all S_n before chunk n, and the last one.

    Directly up to GROUP chunks, by recursion over groups of GROUP above, so that the cost stays linear in N.
    """
    N = added.shape[2]
    if N <= GROUP:
        states = _prefix(added, log_decay, state)
        return states[:, :, :N], states[:, :, N]
    if fill := -N % GROUP:
        added, log_decay = F.pad(added, (0, 0, 0, 0, 0, fill)), F.pad(log_decay, (0, fill))
    added, log_decay = added.unflatten(2, (-1, GROUP)), log_decay.unflatten(2, (-1, GROUP))  # [B, H, G, GROUP, R, P]
    inside = _prefix(added, log_decay, None)
    start, last = _scan(inside[:, :, :, GROUP], log_decay.sum(-1), state)
    since = F.pad(log_decay.cumsum(-1), (1, -1)).exp()[..., None, None]
    return torch.addcmul(inside[:, :, :, :GROUP], since, start[:, :, :, None]).flatten(2, 3)[:, :, :N], last


def _prefix(added: Tensor, log_decay: Tensor, state: Tensor | None) -> Tensor:
    """All N+1 states of a short scan, by one product with the (N+1, N) matrix of decays."""
    weights = F.pad(_decays(log_decay), (0, 0, 1, 0))  # nothing is added before the first state
    states = (weights @ added.flatten(-2)).unflatten(-1, added.shape[-2:])
    if state is None:
        return states
    since = F.pad(log_decay.cumsum(-1), (1, 0)).exp()  # [..., N+1] before chunk n
    return torch.addcmul(states, since[..., None, None], state.unsqueeze(-3))
