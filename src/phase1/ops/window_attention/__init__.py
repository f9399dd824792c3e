"""Causal softmax attention over the last w positions: the banded part T of the mixer."""

from phase1.ops.window_attention.blocked import window_attention
from phase1.ops.window_attention.reference import window_attention_matrix, window_attention_reference

__all__ = ["window_attention", "window_attention_matrix", "window_attention_reference"]
