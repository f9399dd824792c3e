"""The AR-SSM mixer between its two projections; `fused_ar_ssm` is its form in Triton kernels, for GPUs that can run them."""

from importlib.util import find_spec

import torch
from torch import Tensor

from phase1.ops.ar_ssm.reference import Parameters, State, ar_ssm_reference

__all__ = ["Parameters", "State", "ar_ssm_reference", "fused_ar_ssm", "fused_runs"]

OLDEST = 8  # compute capability: Ampere's products of bfloat16 and float32
TYPES = (torch.float16, torch.bfloat16, torch.float32)
HAS_TRITON = find_spec("triton") is not None


def fused_runs(proj: Tensor, p: Parameters, window: int) -> bool:
    """Whether `fused_ar_ssm` can take these arguments on this machine: a constant of a compiled graph."""
    (_, R), P = p.q_scale.shape, p.state_scale.shape[1]
    fits = proj.shape[1] > 0 and window > 0 and R % 2 == 0 and 8 <= R <= 128 and 16 <= P <= 128 and proj.dtype in TYPES
    if not (fits and proj.is_cuda and HAS_TRITON):
        return False
    # without a card the tensors are imitations, which an estimate of memory makes
    return not torch.cuda.is_available() or torch.cuda.get_device_properties(proj.device).major >= OLDEST


def fused_ar_ssm(
    proj: Tensor, p: Parameters, *, window: int, memory: float, state: State | None = None, eps: float = 1e-5
) -> tuple[Tensor, State, Tensor]:
    """Form of `ar_ssm_reference` in Triton kernels: same arguments, result, gradients and errors; parameters in float32."""
    from phase1.ops.ar_ssm.fused import fused_forward  # Triton takes a second to import

    left = () if state is None else (state.conv, state.S, state.k, state.x)
    past: list[Tensor | None] = [tensor.contiguous() for tensor in left]
    past = past or [None] * 4
    start = 0 if state is None else state.position
    out, gate, states, k, x, *_ = fused_forward(proj, *p, *past, start, window, float(memory), eps)
    (H, R), P = p.q_scale.shape, p.state_scale.shape[1]
    inputs = proj[..., : H * (P + 2 * R)]
    rows = inputs if state is None else torch.cat([state.conv, inputs], 1)
    if state is None and rows.shape[1] < 3:
        rows = torch.nn.functional.pad(rows, (0, 0, 3 - rows.shape[1], 0))
    S = states[:, -1].view(len(proj), H, R, P)
    keep = slice(max(0, k.shape[2] - max(0, window - 1)), None)
    return out, State(start + proj.shape[1], rows[:, -3:], S, k[:, :, keep], x[:, :, keep]), gate
