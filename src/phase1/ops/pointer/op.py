"""The pointer as an operator: Triton kernels on a GPU that can run them, blocks of PyTorch products elsewhere.

Opaque to torch.compile, so that nothing of it breaks or unrolls a graph; scores are never kept.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phase1.ops.card import runs_kernels
from phase1.ops.pointer import blocked
from phase1.ops.pointer.reference import check_arguments

WIDEST = 128  # keys


def pointer_log_probability(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, *, window: int, past: int = 0
) -> Tensor:
    """Fast form of `pointer_log_probability_reference`: same arguments, result, gradients and errors."""
    check_arguments(q, k, bias, ids, targets, past, window)
    result: Tensor = pointer(q, k, bias, ids, targets, min(window, max(1, k.shape[1])), past)[0]
    return result


@torch.library.custom_op("phase1::pointer", mutates_args=())
def pointer(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, window: int, past: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward pass needs: the two normalizers whose difference it is, (B, T) each."""
    total, copied = _form(q).normalizers(q, k, bias, ids, targets, window, past)
    return copied - total, total, copied


@pointer.register_fake
def _(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, window: int, past: int
) -> tuple[Tensor, Tensor, Tensor]:
    total, copied, result = (q.new_empty(targets.shape, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(3))
    return result, total, copied


@torch.library.custom_op("phase1::pointer_backward", mutates_args=())
def pointer_backward(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, total: Tensor, copied: Tensor, d_result: Tensor,
    window: int, past: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and bias."""
    return _form(q).gradients(q, k, bias, ids, targets, total, copied, d_result, window, past)


@pointer_backward.register_fake
def _(
    q: Tensor, k: Tensor, bias: Tensor, ids: Tensor, targets: Tensor, total: Tensor, copied: Tensor, d_result: Tensor,
    window: int, past: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_bias = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, bias))
    return d_q, d_k, d_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.window, ctx.past = inputs
    _, total, copied = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(total, copied)
    ctx.save_for_backward(*tensors, total, copied)


def _backward(ctx: Any, d_result: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_result is None:
        return (None,) * 7
    return *pointer_backward(*ctx.saved_tensors, d_result, ctx.window, ctx.past), None, None, None, None


pointer.register_autograd(_backward, setup_context=_keep)


def _form(q: Tensor) -> ModuleType:
    """The kernels or the blocks, whichever can compute with such queries where they are."""
    if q.dtype == torch.float64 or q.shape[-1] > WIDEST or not runs_kernels(q):
        return blocked
    from phase1.ops.pointer import kernel  # Triton takes a second to import

    return kernel


def _pairs(q_shape: Any, window: int, past: int) -> int:
    """Queries and keys that see each other."""
    B, T = q_shape[:2]
    full = min(T, max(0, past + T - window + 1))  # queries, the last ones, whose window is whole
    return int(B * (full * window + (T - full) * past + (T - full) * (T - full + 1) // 2))


@register_flop_formula(torch.ops.phase1.pointer)
def _(q: Any, k: Any, bias: Any, ids: Any, targets: Any, window: int, past: int, **_: Any) -> int:
    """Operations of one product over all pairs of query and key."""
    return 2 * int(q[2]) * _pairs(q, window, past)


@register_flop_formula(torch.ops.phase1.pointer_backward)
def _(
    q: Any, k: Any, bias: Any, ids: Any, targets: Any, total: Any, copied: Any, d_result: Any, window: int, past: int, **_: Any
) -> int:
    """Two products, nothing that is computed again."""
    return 4 * int(q[2]) * _pairs(q, window, past)
