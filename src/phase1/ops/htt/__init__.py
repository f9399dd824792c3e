"""Holographic tensor-train table: rows by lookup, and the whole table for the tied output."""

from phase1.ops.htt.contract import htt_lookup, htt_table
from phase1.ops.htt.reference import Cores, htt_lookup_reference

__all__ = ["Cores", "htt_lookup", "htt_lookup_reference", "htt_table"]
