"""The definition of anchored rows: each a weighted sum of a few rows of a smaller table."""

from torch import Tensor


def check_arguments(rows: Tensor, weights: Tensor, anchors: Tensor) -> None:
    """Raise ValueError unless the shapes are those of `anchored_rows_reference`."""
    if rows.ndim != 2 or weights.ndim != 2 or weights.shape != anchors.shape:
        raise ValueError(
            f"rows (K, D), weights (n, k) and anchors (n, k) expected; "
            f"got {tuple(rows.shape)}, {tuple(weights.shape)} and {tuple(anchors.shape)}"
        )


def anchored_rows_reference(rows: Tensor, weights: Tensor, anchors: Tensor) -> Tensor:
    """E_i = Σ_j w_ij rows[a_ij].

    A tensor train whose first core is one number per term and whose second core all tokens share, each term with a
    grid of its own (additive codes).

    Args:
        rows: (K, D).
        weights: w, (n, k).
        anchors: a, (n, k) integers in [0, K).
    Returns:
        (n, D), dtype of `rows`.
    Raises:
        ValueError: the shapes do not fit together.

    Source: Babenko and Lempitsky 2014, "Additive Quantization", section 3; the weights as in sparse coding.
    """
    check_arguments(rows, weights, anchors)
    return (weights[..., None].to(rows.dtype) * rows[anchors]).sum(1)
