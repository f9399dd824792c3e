"""The definition of the tied cross-entropy, with all logits in memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The target of a position that is not scored."""


ALIGNMENT = 8
"""Sizes of products in half precision: tensor cores are several times slower where one is no multiple of it."""


Factors = Sequence[tuple[Tensor, Tensor]]
"""Logits as products side by side: states (N, d_j) and rows (V_j, d_j) for each shard of the vocabulary, V = Σ V_j."""


def check_arguments(factors: Factors, targets: Tensor, bias: Tensor | None, log_odds: Tensor | None = None) -> None:
    """Raise ValueError unless the shapes are those of `tied_cross_entropy_reference`."""
    N, V = len(factors[0][0]), sum(len(rows) for _, rows in factors)
    for states, rows in factors:
        if states.ndim != 2 or rows.ndim != 2 or states.shape[1] != rows.shape[1] or len(states) != N:
            raise ValueError(
                f"states (N, d) = ({N}, d) and rows (V, d) must share d; got {tuple(states.shape)} and {tuple(rows.shape)}"
            )
    if targets.shape != (N,):
        raise ValueError(f"targets must be (N,) = ({N},); got {tuple(targets.shape)}")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must be (V,) = ({V},); got {tuple(bias.shape)}")
    if log_odds is not None and log_odds.shape != targets.shape:
        raise ValueError(f"log_odds must be (N,) = ({N},); got {tuple(log_odds.shape)}")


def tied_cross_entropy_reference(
    factors: Factors, targets: Tensor, bias: Tensor | None = None, log_odds: Tensor | None = None
) -> Tensor:
    """Mean over scored positions n of nll_n = log Σ_j exp(z_nj) - z_n,target_n with z_n = [h¹_n E¹ᵀ | h²_n E²ᵀ | …] + b (nats).

    With log-odds o_n it is the mean of nll_n - softplus(nll_n + o_n) = -log(p_n + exp(o_n)), p_n = exp(-nll_n). That is the
    loss of a mixture with a second distribution whose probability times weight is exp(o_n), up to the mixture's normalization.

    Args:
        factors: hʲ and Eʲ for each shard of the vocabulary, in order: final states (N, D) and a table (V, D), or several
            shards, which may be narrower and have projections as states. Rows are cast to the dtype of their states.
        targets: (N,) integers in [0, V), or IGNORE for positions that are not scored.
        bias: b, (V,); zero if None.
        log_odds: o, (N,), at least float32; None means -inf, which leaves the cross-entropy.
    Returns:
        loss: scalar, at least float32; nan if no position is scored.
    Raises:
        ValueError: the shapes do not fit together.
    """
    check_arguments(factors, targets, bias, log_odds)
    logits = _logits(factors)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    if log_odds is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    scored = targets != IGNORE
    return (nll - F.softplus(nll + log_odds)).where(scored, 0).sum() / scored.sum()


def _logits(factors: Factors) -> Tensor:
    """(N, V), computed with zero rows up to a multiple of ALIGNMENT, as usual for a vocabulary of odd size."""
    padded = [(h, F.pad(rows.to(h.dtype), (0, 0, 0, -len(rows) % ALIGNMENT)), len(rows)) for h, rows in factors]
    parts = [(h @ rows.T)[:, :V] for h, rows, V in padded]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
