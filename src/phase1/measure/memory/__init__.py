"""Peak memory of a training step: measured on a GPU, or estimated without one."""
