"""Rows as weighted sums of a few other rows."""

from phase1.ops.anchored_rows.bags import Users, anchored_rows, users_of
from phase1.ops.anchored_rows.reference import anchored_rows_reference

__all__ = ["Users", "anchored_rows", "anchored_rows_reference", "users_of"]
