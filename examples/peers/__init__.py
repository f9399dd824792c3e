"""Other people's models beside those of phase1; docs/extending.md."""
