"""Programs that use phase1 from outside."""
