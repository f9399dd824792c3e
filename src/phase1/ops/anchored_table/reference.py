"""The definition of an anchored table, row by row."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_arguments(own: Tensor, weights: Tensor, anchors: Tensor, levels: Sequence[int]) -> None:
    """Raise ValueError unless the shapes are those of `anchored_table_reference`."""
    past = len(own) - levels[0] if own.ndim == 2 else None
    if own.ndim != 2 or weights.ndim != 2 or weights.shape != anchors.shape or len(weights) != past:
        raise ValueError(
            f"own (V, D), weights and anchors (V - {levels[0]}, k) expected; "
            f"got {tuple(own.shape)}, {tuple(weights.shape)} and {tuple(anchors.shape)}"
        )
    if list(levels) != sorted(levels) or levels[-1] != len(own):
        raise ValueError(f"levels must rise and end at V={len(own)}; got {list(levels)}; they are where levels begin, and V")


def anchored_table_reference(own: Tensor, weights: Tensor, anchors: Tensor, levels: Sequence[int]) -> Tensor:
    """E_i = own_i for i < K, E_i = own_i + Σ_j w_ij E_a_ij above: E = (I - W)⁻¹ own, W strictly below the diagonal.

    A tensor train whose first core is one number per term and whose second core all tokens share, each term with a
    grid of its own (additive codes).

    Args:
        own: the part of each row that is its own, (V, D).
        weights: w of the rows from K on, (V - K, k).
        anchors: a, (V - K, k) integers, each below the beginning of the level of its row.
        levels: where levels begin, K the first of them, and V at the end.
    Returns:
        (V, D), dtype of `own`.
    Raises:
        ValueError: the shapes or levels do not fit together.

    Source: Babenko and Lempitsky 2014, "Additive Quantization", section 3; the weights as in sparse coding.
    """
    check_arguments(own, weights, anchors, levels)
    first, rows = levels[0], list(own[: levels[0]])
    for i in range(first, len(own)):
        sums = [w * rows[a] for w, a in zip(weights[i - first].to(own.dtype), anchors[i - first].tolist())]
        rows.append(own[i] + sum(sums))
    return torch.stack(rows)
