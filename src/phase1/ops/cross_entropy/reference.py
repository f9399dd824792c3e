"""The definition of the tied cross-entropy, with all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position that is not scored (padding)."""


def check_arguments(hidden: Tensor, table: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless the shapes are those of `tied_cross_entropy_reference`."""
    if hidden.ndim != 2 or table.ndim != 2 or hidden.shape[1] != table.shape[1]:
        raise ValueError(
            f"hidden (N, D) and table (V, D) must share D; got {tuple(hidden.shape)} and {tuple(table.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be (N,) = ({hidden.shape[0]},); got {tuple(targets.shape)}")


def tied_cross_entropy_reference(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean over scored positions n of log Σ_j exp(h_n · E_j) - h_n · E_{target_n}, in nats.

    Args:
        hidden: final states, (N, D).
        table: one row per token, (V, D); taken in the dtype of `hidden`.
        targets: (N,) integers in [0, V), or IGNORE for positions that are not scored.
    Returns:
        loss: scalar, at least float32; nan if no position is scored.
    Raises:
        ValueError: the shapes do not fit together.
    """
    check_arguments(hidden, table, targets)
    logits = hidden @ table.to(hidden.dtype).T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORE)
