"""A model spread over the ranks: parameters, gradients and optimizer state, each rank a part (PyTorch's FSDP2)."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over the ranks, as one; all of them call it. Any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
