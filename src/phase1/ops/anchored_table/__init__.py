"""A table whose rows are weighted sums of earlier rows, each with a part of its own."""

from phase1.ops.anchored_table.levels import Users, anchored_table, users_of
from phase1.ops.anchored_table.reference import anchored_table_reference

__all__ = ["Users", "anchored_table", "anchored_table_reference", "users_of"]
