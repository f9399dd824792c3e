"""The definition of the tied cross-entropy, with all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position that is not scored (padding)."""


ALIGNMENT = 8
"""Sizes of products in half precision: tensor cores are several times slower where one is no multiple of it."""


def check_arguments(hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the shapes are those of `tied_cross_entropy_reference`."""
    if hidden.ndim != 2 or table.ndim != 2 or hidden.shape[1] != table.shape[1]:
        raise ValueError(f"hidden (N, D) and table (V, D) must share D; got {tuple(hidden.shape)} and {tuple(table.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be (N,) = ({hidden.shape[0]},); got {tuple(targets.shape)}")
    if bias is not None and bias.shape != table.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({table.shape[0]},); got {tuple(bias.shape)}")


def tied_cross_entropy_reference(hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean over scored positions n of log Σ_j exp(z_nj) - z_n,target_n with z_nj = h_n · E_j + b_j, in nats.

    Args:
        hidden: final states, (N, D).
        table: one row per token, (V, D); taken in the dtype of `hidden`.
        targets: (N,) integers in [0, V), or IGNORE for positions that are not scored.
        bias: b, (V,); zero if None.
    Returns:
        loss: scalar, at least float32; nan if no position is scored.
    Raises:
        ValueError: the shapes do not fit together.
    """
    check_arguments(hidden, table, targets, bias)
    V = len(table)
    rows = F.pad(table.to(hidden.dtype), (0, 0, 0, -V % ALIGNMENT))  # as is usual for a vocabulary of odd size
    logits = (hidden @ rows.T)[:, :V].to(torch.promote_types(hidden.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    return F.cross_entropy(logits, targets, ignore_index=IGNORE)
