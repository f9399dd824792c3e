"""Verdicts: a number of a record against a limit. Needs no torch."""
