"""Measurements: memory, time, scaling, perplexity, and the statistics that judge them."""
