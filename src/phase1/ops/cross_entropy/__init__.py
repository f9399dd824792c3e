"""Cross-entropy of a tied output, without holding tokens × vocabulary."""

from phase1.ops.cross_entropy.chunked import USUAL_PARTS, tied_cross_entropy, tied_nll
from phase1.ops.cross_entropy.reference import ALIGNMENT, IGNORE, tied_cross_entropy_reference

__all__ = ["ALIGNMENT", "IGNORE", "USUAL_PARTS", "tied_cross_entropy", "tied_cross_entropy_reference", "tied_nll"]
