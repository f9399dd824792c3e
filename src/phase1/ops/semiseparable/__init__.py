"""y = tril(U Vᵀ ⊙ decay) x for every head. `semiseparable` is what the layers call."""

from phase1.ops.semiseparable.chunked import semiseparable
from phase1.ops.semiseparable.reference import semiseparable_matrix, semiseparable_reference

__all__ = ["semiseparable", "semiseparable_matrix", "semiseparable_reference"]
