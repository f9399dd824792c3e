"""A model spread over the ranks: parameters, gradients and optimizer state, each rank a part (PyTorch's FSDP2)."""

import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from phase1.parallel.group import gate, size, sum_
from phase1.parallel.parts import own, whole
from phase1.parallel.replicas import Alone


class Shards(Alone):
    """Gradients of parameters that are spread over the ranks: the backward pass adds them up, every rank keeps its part.

    Clipping and overflow need the parts of all.
    """

    def __init__(self) -> None:
        self.size = size()

    def begin(self) -> None:
        gate()

    def total(self, scored: Tensor) -> Tensor:
        return sum_(scored)

    def finish(self, loss: Tensor) -> Tensor:
        gate()
        return sum_(loss)

    def overflow(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        if scaler.is_enabled():
            for found in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(own(found), dist.ReduceOp.MAX)

    def whole(self, norm: Tensor) -> Tensor:
        return whole(norm)


def spread(model: nn.Module, blocks: Iterable[nn.Module], methods: Sequence[str], device: torch.device) -> Shards:
    """Leave every rank its part of the parameters of `model`, equal on all ranks so far, on `device`.

    A block's are whole on every rank while it computes, those outside blocks from the beginning of a micro batch to
    its end. methods: of `model`, those that compute with it.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # none is changed in place
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"--shard needs a newer PyTorch; got {torch.__version__}; leave it out, or update")
    if device.type == "cuda":
        torch.cuda.init()  # else the mesh would look for a GPU of this rank's number, and every rank sees one
    mesh = init_device_mesh(device.type, (size(),))
    modules = [*blocks, model]
    for module in modules:
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are shares of the step's: their gradients add up, and have no mean
        module.set_force_sum_reduction_for_comms(True)  # not all backends have a sum with a factor
    for method in methods:
        register_fsdp_forward_method(model, method)
    return Shards()
