"""The definition of the holographic tensor train: one row at a time, one term at a time."""

from typing import NamedTuple

import torch
from torch import Tensor


class Cores(NamedTuple):
    """Parameters of a table of v1·v2 rows of width d1·d2 with r terms; the bias may be None."""

    a: Tensor  # (v1, r, d1)
    b: Tensor  # (v2, r, d2)
    phase_a: Tensor  # (v1, r), radians
    phase_b: Tensor  # (v2, r), radians
    bias_b: Tensor | None  # (v2, d1·d2)

    @property
    def rows(self) -> int:
        return self.a.shape[0] * self.b.shape[0]


def check_positions(positions: Tensor, cores: Cores) -> None:
    """Raise ValueError unless every position is a row of the table."""
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < cores.rows:
        found = f"{int(positions.min())} to {int(positions.max())}"
        raise ValueError(f"positions must be between 0 and {cores.rows - 1}; got {found}")


def htt_lookup_reference(positions: Tensor, cores: Cores) -> Tensor:
    """E[i] = Σ_ρ cos(φ1[i1, ρ] + φ2[i2, ρ]) A[i1, ρ, :] ⊗ B[i2, ρ, :] + b2[i2], with i = i1·v2 + i2.

    Args:
        positions: rows to read, any shape, integers in [0, v1·v2).
        cores: the parameters.
    Returns:
        rows: (*positions.shape, d1·d2).
    Raises:
        ValueError: a position is not a row of the table; nothing is clamped.

    Source: Oseledets 2011, "Tensor-Train Decomposition", section 2 (two cores, one phase per core row: docs/design.md).
    """
    check_positions(positions, cores)
    rows = []
    for position in positions.flatten().tolist():
        i1, i2 = divmod(position, cores.b.shape[0])
        row = torch.zeros(cores.a.shape[2], cores.b.shape[2], dtype=cores.a.dtype, device=cores.a.device)
        for rho in range(cores.a.shape[1]):
            wave = torch.cos(cores.phase_a[i1, rho] + cores.phase_b[i2, rho])
            row = row + wave * torch.outer(cores.a[i1, rho], cores.b[i2, rho])
        rows.append(row.flatten() if cores.bias_b is None else row.flatten() + cores.bias_b[i2])
    width = cores.a.shape[2] * cores.b.shape[2]
    return torch.stack(rows).view(*positions.shape, width) if rows else cores.a.new_zeros(*positions.shape, width)
