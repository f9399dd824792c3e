"""A table whose rows are weighted sums of earlier rows, each with a part of its own."""

from phase1.ops.anchored_table.inverse import InverseIndex, inverse_index
from phase1.ops.anchored_table.op import anchored_table
from phase1.ops.anchored_table.reference import anchored_table_reference

__all__ = ["InverseIndex", "anchored_table", "anchored_table_reference", "inverse_index"]
