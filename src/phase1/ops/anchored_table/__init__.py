"""A table whose rows are weighted sums of earlier rows, each with a part of its own."""

from phase1.ops.anchored_table.op import anchored_table
from phase1.ops.anchored_table.reference import anchored_table_reference
from phase1.ops.anchored_table.users import Users, users_of

__all__ = ["Users", "anchored_table", "anchored_table_reference", "users_of"]
