"""Many GPUs: the processes of torchrun as one run, their gradients as those of one step."""
