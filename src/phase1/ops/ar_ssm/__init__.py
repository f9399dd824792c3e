"""The AR-SSM mixer between its two projections; `fused_ar_ssm` and, for one more token, `ar_ssm_step` are its forms in Triton
kernels, for GPUs that can run them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from phase1.ops.ar_ssm import self_check
from phase1.ops.ar_ssm.operator import fused_forward
from phase1.ops.ar_ssm.reference import TAPS, Parameters, State, ar_ssm_reference
from phase1.ops.card import OLDEST, is_recent
from phase1.ops.self_check import DISPROVEN

__all__ = ["Parameters", "State", "ar_ssm_reference", "ar_ssm_step", "fused_ar_ssm", "fused_runs", "imitated_card", "step_runs"]

TYPES = (torch.float16, torch.bfloat16, torch.float32)


_IMITATED = ContextVar("imitated", default=False)


@contextmanager
def imitated_card(capability: int) -> Iterator[None]:
    """Within the block, CPU tensors without contents count as tensors on a card of that (major) capability."""
    token = _IMITATED.set(capability >= OLDEST)
    try:
        yield
    finally:
        _IMITATED.reset(token)


def fused_runs(proj: Tensor, p: Parameters, window: int) -> bool:
    """Whether `fused_ar_ssm` supports these arguments on this machine and has passed its self-check there.

    The check cannot run while a graph is compiled or captured; there the result of an earlier eager call counts.
    """
    (_, R), P = p.q_scale.shape, p.state_scale.shape[1]
    fits = proj.shape[1] > 0 and window > 0 and R % 2 == 0 and 8 <= R <= 128 and 16 <= P <= 128 and proj.dtype in TYPES
    if not proj.is_cuda:
        return fits and not torch.compiler.is_compiling() and _IMITATED.get()
    if not fits or not is_recent(proj):
        return False
    if torch.compiler.is_compiling() or type(proj) is not Tensor or torch.cuda.is_current_stream_capturing():
        return "AR-SSM" not in DISPROVEN
    fixed = R - (0 if p.gate_weight is None else len(p.gate_weight))
    return self_check.proven(proj.device, R, P, fixed, window, proj.dtype) and "AR-SSM" not in DISPROVEN


def step_runs(proj: Tensor, p: Parameters, window: int) -> bool:
    """Whether `ar_ssm_step` does, after a state: for one token of which nothing is learnt, where `fused_runs`."""
    eager = type(proj) is Tensor and not torch.compiler.is_compiling()  # it is no operator that a compiler knows
    return proj.shape[1] == 1 and not torch.is_grad_enabled() and eager and fused_runs(proj, p, window)


def ar_ssm_step(
    proj: Tensor, p: Parameters, *, window: int, memory: float, state: State, eps: float = 1e-5
) -> tuple[Tensor, State, Tensor]:
    """Form of `ar_ssm_reference` in two Triton kernels for T = 1: same arguments and result, without gradients.

    The position may be a tensor of one number, as in a CUDA graph: the host does not read it, and the next one is a tensor too.
    """
    from phase1.ops.ar_ssm.step import step_forward  # Triton takes a second to import

    return step_forward(proj, p, window, memory, state, eps)


def fused_ar_ssm(
    proj: Tensor, p: Parameters, *, window: int, memory: float, state: State | None = None, eps: float = 1e-5
) -> tuple[Tensor, State, Tensor]:
    """Form of `ar_ssm_reference` in Triton kernels: same arguments, result, gradients and errors; parameters in float32."""
    left = () if state is None else (state.conv, state.S, state.k, state.x)
    past: list[Tensor | None] = [tensor.contiguous() for tensor in left]
    past = past or [None] * 4
    start = 0 if state is None else state.position
    out, gate, states, k, x, *_ = fused_forward(proj, *p, *past, start, window, float(memory), eps)
    (H, R), P = p.q_scale.shape, p.state_scale.shape[1]
    rows = proj[:, max(0, proj.shape[1] - TAPS + 1) :, : H * (P + 2 * R)]
    if rows.shape[1] < TAPS - 1:
        earlier = rows.new_zeros(len(rows), TAPS - 1, rows.shape[2]) if state is None else state.conv
        rows = torch.cat([earlier, rows], 1)[:, 1 - TAPS :]
    S = states[:, -1].view(len(proj), H, R, P)
    keep = slice(max(0, k.shape[2] - max(0, window - 1)), None)
    return out, State(start + proj.shape[1], rows, S, k[:, :, keep], x[:, :, keep]), gate
