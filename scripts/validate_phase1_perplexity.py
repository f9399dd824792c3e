#!/usr/bin/env python3
"""Perplexity of trained models, engine against the FP16 Transformer: the same as `phase1 perplexity`."""

import sys

from phase1.cli import main

if __name__ == "__main__":
    sys.exit(main(["perplexity", *sys.argv[1:]]))
