"""The loss inside groups as an operator: Triton kernels on a GPU that can run them, gathered rows elsewhere."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phase1.ops.card import runs_kernels
from phase1.ops.group_nll import gathered
from phase1.ops.group_nll.reference import check_arguments

LARGEST = 256  # group


def group_nll(states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, size: int) -> Tensor:
    """Fast form of `group_nll_reference`: same arguments, result, gradients and errors."""
    check_arguments(states, rows, bias, targets, size)
    nll: Tensor = _losses(states, rows, bias, targets, size)[0]
    return nll


@torch.library.custom_op("phase1::group_nll", mutates_args=())
def _losses(states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; the normalizer of each token's group; the tokens by groups, those in none last; where each group begins."""
    n_groups = -(-len(rows) // size)
    groups = torch.where(targets < 0, n_groups, targets // size)
    found, order = groups.sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(n_groups + 1, device=found.device))
    with torch.autocast(states.device.type, enabled=False):
        nll, normalizer = _form(states, size).losses(states, rows, bias, targets, order, starts, size)
    return nll, normalizer, order, starts


@_losses.register_fake
def _(states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(states.dtype, torch.float32)
    nll, normalizer = (states.new_empty(len(states), dtype=wide) for _ in range(2))
    starts = targets.new_empty(-(-len(rows) // size) + 1, dtype=torch.int64)
    return nll, normalizer, targets.new_empty(targets.shape, dtype=torch.int64), starts


@torch.library.custom_op("phase1::group_nll_backward", mutates_args=())
def _gradients(
    states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, order: Tensor, starts: Tensor, normalizer: Tensor,
    d_nll: Tensor, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(states.device.type, enabled=False):
        form = _form(states, size)
        return form.gradients(states, rows, bias, targets, order, starts, normalizer, d_nll, size)


@_gradients.register_fake
def _(
    states: Tensor, rows: Tensor, bias: Tensor, targets: Tensor, order: Tensor, starts: Tensor, normalizer: Tensor,
    d_nll: Tensor, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_states, d_rows, d_bias = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (states, rows, bias))
    return d_states, d_rows, d_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.size = inputs
    _, normalizer, order, starts = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(normalizer, order, starts)
    ctx.save_for_backward(*tensors, order, starts, normalizer)


def _backward(ctx: Any, d_nll: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_nll is None:
        return (None,) * 5
    return *_gradients(*ctx.saved_tensors, d_nll, ctx.size), None, None


_losses.register_autograd(_backward, setup_context=_keep)


def _form(states: Tensor, size: int) -> ModuleType:
    """The kernels or PyTorch's operators, whichever can compute with such states where they are."""
    if states.dtype == torch.float64 or size > LARGEST or not runs_kernels(states):
        return gathered
    from phase1.ops.group_nll import kernel  # Triton takes a second to import

    return kernel


@register_flop_formula([torch.ops.phase1.group_nll, torch.ops.phase1.group_nll_backward])
def _(*_: object, **__: object) -> int:
    """None: how many tokens are in a group is not in the shapes, and few are, so that no utilization is flattered."""
    return 0
