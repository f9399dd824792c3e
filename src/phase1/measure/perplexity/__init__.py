"""Perplexity of trained models on one text."""
