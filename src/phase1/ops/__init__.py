"""Pure tensor functions, a folder each: `reference.py` is the slow definition, the other file the fast form."""
