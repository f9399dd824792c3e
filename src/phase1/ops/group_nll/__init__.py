"""Loss of a token among the tokens of its group: the second level of a two-level output."""

from phase1.ops.group_nll.op import group_nll
from phase1.ops.group_nll.reference import group_nll_reference

__all__ = ["group_nll", "group_nll_reference"]
