"""phase1: a causal language model of linear cost, and the suite that measures it honestly."""

__version__ = "0.1.0"
