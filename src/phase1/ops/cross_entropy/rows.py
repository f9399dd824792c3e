"""Softmax of rows of logits, and its gradient written over them: the part of the loss between two matrix products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phase1.ops.card import runs_kernels


def softmax_rows_reference(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_log_prob: Tensor,
    weights: Tensor | None,
    log_odds: Tensor | None = None,
) -> None:
    """Write log p_n = log softmax(z_n)[target_n], z = logits + bias; with `weights`, overwrite `logits` by d(loss)/d(logits).

    With weights w the loss is -w_n log p_n, and its gradient w_n (softmax(z_n) - onehot(target_n)).
    With log_odds o as well it is w_n (-log p_n - softplus(o_n - log p_n)), and the gradient is times sigmoid(log p_n - o_n).

    Args:
        logits: (n, V), any dtype and distance between rows; overwritten if there are weights.
        bias: (V,), at least float32, or None.
        target: (n,) integers in [0, V).
        target_log_prob: (n,), at least float32; receives log p_n.
        weights: (n,) numbers or booleans: 0 for a row without gradient; None for no gradient at all.
        log_odds: (n,), at least float32, -inf allowed, or None.
    """
    z = logits.to(target_log_prob.dtype, copy=True) if bias is None else logits + bias
    z -= z.amax(1, keepdim=True)
    index = target[:, None]
    target_logit = z.gather(1, index)
    total = z.exp_().sum(1, keepdim=True)
    torch.sub(target_logit, total.log(), out=target_log_prob[:, None])
    if weights is not None:
        if log_odds is not None:
            weights = weights * (target_log_prob - log_odds).sigmoid()
        z.scatter_add_(1, index, -total)  # times 1 / total: softmax - one-hot
        torch.mul(z, weights[:, None] / total, out=logits)


# An operator of its own, so that the estimate of memory, on tensors without contents, sees what a GPU allocates: nothing.
softmax_rows = torch.library.custom_op(
    "phase1::softmax_rows", softmax_rows_reference, mutates_args=("logits", "target_log_prob")
)
"""Fast form of `softmax_rows_reference`: same arguments and results; a kernel on a GPU that runs it."""

softmax_rows.register_fake(lambda *args, **options: None)


@softmax_rows.register_kernel("cuda")
def _(logits: Tensor, *args: Any, **options: Any) -> None:
    _form(logits)(logits, *args, **options)


def _form(logits: Tensor) -> Callable[..., None]:
    """The kernel or the definition, whichever can compute with such logits where they are."""
    if logits.dtype == torch.float64 or not runs_kernels(logits):
        return softmax_rows_reference
    from phase1.ops.cross_entropy.kernel import softmax_rows_kernel  # Triton takes a second to import

    return softmax_rows_kernel
