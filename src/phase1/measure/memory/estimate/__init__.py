"""Peak memory without a GPU: a step on fake tensors through a simulated allocator."""
