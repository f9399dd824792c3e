"""Angles of rotary position embeddings, as one operator that a compiler does not look into."""

from phase1.ops.rotary.angles import rotary_angles, rotary_angles_reference

__all__ = ["rotary_angles", "rotary_angles_reference"]
