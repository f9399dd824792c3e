"""Holographic tensor-train table: all rows at once, and the definition of each."""

from phase1.ops.htt.contract import htt_table
from phase1.ops.htt.reference import Cores, htt_lookup_reference

__all__ = ["Cores", "htt_lookup_reference", "htt_table"]
