"""Statistics of samples, and what they allow to say. Needs no torch."""

Bounds = tuple[float, float]
