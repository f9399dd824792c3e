"""Tensors that are spread over the ranks, as checkpoints see them: whole. It imports little where there are none."""

from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over the ranks, as one; all of them call it. Any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that is spread over the ranks, sharing its memory; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """This rank's part of `tensor` where `like`, of the same shape, is spread over the ranks, on its device; else all of it."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "full_tensor") or like.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)
