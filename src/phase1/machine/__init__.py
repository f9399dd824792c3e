"""The machine: what it is, and processes of their own on it."""
