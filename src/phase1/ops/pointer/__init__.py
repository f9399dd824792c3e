"""Probability that a pointer to the last w tokens of a text gives a target: what a copy head copies."""

from phase1.ops.pointer.op import pointer_log_probability
from phase1.ops.pointer.reference import pointer_log_probability_reference, pointer_matrix

__all__ = ["pointer_log_probability", "pointer_log_probability_reference", "pointer_matrix"]
