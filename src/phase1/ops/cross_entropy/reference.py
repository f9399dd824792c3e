"""The definition of the tied cross-entropy, with all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The target of a position that is not scored."""


ALIGNMENT = 8
"""Sizes of products in half precision: tensor cores are several times slower where one is no multiple of it."""


def check_arguments(
    hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None = None
) -> None:
    """Raise ValueError unless the shapes are those of `tied_cross_entropy_reference`."""
    if hidden.ndim != 2 or table.ndim != 2 or hidden.shape[1] != table.shape[1]:
        raise ValueError(f"hidden (N, D) and table (V, D) must share D; got {tuple(hidden.shape)} and {tuple(table.shape)}")
    N, V = len(hidden), len(table) if bias is None else len(bias)
    if len(table) not in (V, V + -V % ALIGNMENT):
        raise ValueError(f"bias must be (V,), one for each row of the table but zeros at its end; got {V} of {len(table)}")
    if targets.shape != (N,):
        raise ValueError(f"targets must be (N,) = ({N},); got {tuple(targets.shape)}")
    if log_odds is not None and log_odds.shape != targets.shape:
        raise ValueError(f"log_odds must be (N,) = ({N},); got {tuple(log_odds.shape)}")


def tied_cross_entropy_reference(
    hidden: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None, log_odds: Tensor | None = None
) -> Tensor:
    """Mean over scored positions n of nll_n = log Σ_j exp(z_nj) - z_n,target_n with z = hidden tableᵀ + bias (nats).

    With log-odds o_n it is the mean of nll_n - softplus(nll_n + o_n) = -log(p_n + exp(o_n)), p_n = exp(-nll_n). That is the
    loss of a mixture with a second distribution whose probability times weight is exp(o_n), up to the mixture's normalization.

    Args:
        hidden: final states, (N, D).
        table: (V, D), cast to the dtype of the states; with a bias also (V', D), V' the next multiple of ALIGNMENT, whose rows
            past V are zeros: then nobody has to copy it.
        targets: (N,) integers in [0, V), or IGNORE for positions that are not scored.
        bias: (V,); zero if None.
        log_odds: o, (N,), at least float32; None means -inf, which leaves the cross-entropy.
    Returns:
        loss: scalar, at least float32; nan if no position is scored.
    Raises:
        ValueError: the shapes do not fit together.
    """
    check_arguments(hidden, table, targets, bias, log_odds)
    rows = F.pad(table.to(hidden.dtype), (0, 0, 0, -len(table) % ALIGNMENT))  # as usual for a vocabulary of odd size
    logits = (hidden @ rows.T)[:, : len(table) if bias is None else len(bias)]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    if log_odds is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    scored = targets != IGNORE
    return (nll - F.softplus(nll + log_odds)).where(scored, 0).sum() / scored.sum()
