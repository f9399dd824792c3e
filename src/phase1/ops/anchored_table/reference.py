"""The definition of an anchored table, row by row."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_arguments(own: Sequence[Tensor], weights: Tensor, anchors: Tensor, levels: Sequence[int]) -> None:
    """Raise ValueError unless the shapes are those of `anchored_table_reference`."""
    V = levels[-1]
    if (
        any(part.ndim != 2 or part.shape[1] > own[0].shape[1] for part in own)
        or sum(map(len, own)) != V
        or weights.ndim != 2
        or weights.shape != anchors.shape
        or len(weights) != V - levels[0]
    ):
        raise ValueError(
            f"own of {V} rows, (n, D) and then (n, D or fewer), weights and anchors ({V} - {levels[0]}, k) expected; "
            f"got {[tuple(part.shape) for part in own]}, {tuple(weights.shape)} and {tuple(anchors.shape)}"
        )
    if list(levels) != sorted(levels):
        raise ValueError(f"levels must rise; got {list(levels)}; they are where levels begin, and V")


def anchored_table_reference(
    own: Sequence[Tensor], weights: Tensor, anchors: Tensor, levels: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """E_i = own_i for i < K, E_i = own_i + Σ_j w_ij E_a_ij above: E = (I - W)⁻¹ own, W strictly below the diagonal.

    A tensor train whose first core is one number per term and whose second core all tokens share, each term with a
    grid of its own (additive codes).

    Args:
        own: the part of each row that is its own: of chunk_rows of rows one after the other, (n, D) and then (n, m), the
            first m ≤ D coordinates; the others are 0.
        weights: w of the rows from K on, (V - K, k).
        anchors: a, (V - K, k) integers, each below the beginning of the level of its row.
        levels: where levels begin, K the first of them, and V at the end.
        dtype: of the table and of the arithmetic.
    Returns:
        (V, D).
    Raises:
        ValueError: the shapes or levels do not fit together.

    Source: Babenko and Lempitsky 2014, "Additive Quantization", section 3; the weights as in sparse coding.
    """
    check_arguments(own, weights, anchors, levels)
    first, D = levels[0], own[0].shape[1]
    rows: list[Tensor] = []
    for i, part in enumerate(row for stretch in own for row in stretch.to(dtype)):
        row = torch.cat([part, part.new_zeros(D - len(part))])
        if i >= first:
            row = row + sum(w * rows[a] for w, a in zip(weights[i - first].to(dtype), anchors[i - first].tolist()))
        rows.append(row)
    return torch.stack(rows)
