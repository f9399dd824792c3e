"""Softmax of rows of logits and its gradient, written over the logits: the part of the loss between two products."""

from importlib.util import find_spec

import torch
from torch import Tensor


def softmax_rows_reference(
    logits: Tensor,
    bias: Tensor | None,
    column: Tensor,
    picked: Tensor,
    weights: Tensor | None,
    log_odds: Tensor | None = None,
) -> None:
    """picked_n = log softmax(z_n)[column_n] with z = logits + bias; if there are weights, logits_n becomes its gradient.

    That is weights_n (softmax(z_n) - onehot(column_n)), of -weights_n picked_n, and with
    log_odds o that times sigmoid(picked_n - o_n), of weights_n (-picked_n - softplus(o_n - picked_n)).

    Args:
        logits: (n, V), any dtype and distance between rows; overwritten if there are weights.
        bias: (V,), at least float32, or None.
        column: (n,) integers in [0, V).
        picked: (n,), at least float32; all of it is written.
        weights: (n,) numbers or booleans: 0 for a row without gradient; None for no gradient at all.
        log_odds: (n,), at least float32, -inf allowed, or None.
    """
    z = logits.to(picked.dtype, copy=True) if bias is None else logits + bias
    z -= z.amax(1, keepdim=True)
    column = column[:, None]
    chosen = z.gather(1, column)
    total = z.exp_().sum(1, keepdim=True)
    torch.sub(chosen, total.log(), out=picked[:, None])
    if weights is not None:
        if log_odds is not None:
            weights = weights * (picked - log_odds).sigmoid()
        z.scatter_add_(1, column, -total)  # times 1 / total: softmax - one-hot
        torch.mul(z, weights[:, None] / total, out=logits)


# An operator of its own, so that the estimate of memory, on tensors without contents, sees what a GPU allocates: nothing.
softmax_rows = torch.library.custom_op("phase1::softmax_rows", softmax_rows_reference, mutates_args=("logits", "picked"))
"""Fast form of `softmax_rows_reference`: same arguments and results; a kernel on a GPU, if Triton is there."""


@softmax_rows.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    column: Tensor,
    picked: Tensor,
    weights: Tensor | None,
    log_odds: Tensor | None = None,
) -> None:
    pass


if find_spec("triton"):

    @softmax_rows.register_kernel("cuda")
    def _(
        logits: Tensor,
        bias: Tensor | None,
        column: Tensor,
        picked: Tensor,
        weights: Tensor | None,
        log_odds: Tensor | None = None,
    ) -> None:
        from phase1.ops.cross_entropy.kernel import softmax_rows_kernel  # Triton takes a second to import

        softmax_rows_kernel(logits, bias, column, picked, weights, log_odds)
