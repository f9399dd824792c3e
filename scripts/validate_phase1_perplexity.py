#!/usr/bin/env python3
"""Perplexity of trained models, engine against the FP16 Transformer: the same as `phase1 perplexity`."""

import sys

from _start import run

if __name__ == "__main__":
    sys.exit(run("perplexity"))
