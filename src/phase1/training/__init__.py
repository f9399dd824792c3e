"""Training: one step, the job that repeats it, and its checkpoints."""
