"""The same model on every rank: gradients of one step, each rank's share of its batch, as one sum over all."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from phase1.parallel.group import gate, size, sum_, together

ALIGNED = 32  # elements: views of the flat buffer begin where fused optimizers read fastest


class Alone:
    """One process: its gradients are all there are."""

    size = 1

    def begin(self) -> None:
        """Before a step: wait until all ranks are here and well. A GPU would wait for one that is not for ever."""

    def total(self, scored: Tensor) -> Tensor:
        """The scored targets of the step, from those of this rank."""
        return scored

    def finish(self, loss: Tensor) -> Tensor:
        """After the micro batches: the gradients become those of the step; the loss of the step, from this rank's part."""
        return loss

    def overflow(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """After the gradients are unscaled: an overflow on one rank is one on all."""

    def whole(self, norm: Tensor) -> Tensor:
        """The norm of all gradients."""
        return norm

    def tensors(self) -> Iterable[Tensor]:
        """What is kept for it from step to step."""
        return ()


class Replicas(Alone):
    """Gradients live in one flat buffer, which is added up over all ranks once a step, with the loss at its end.

    After it every rank holds the same gradients, bit for bit, so that clipping, overflow and the optimizer's step are the same
    everywhere and nothing else has to be exchanged. Micro batches add to the buffer in place, CUDA graphs too.
    """

    def __init__(self, parameters: Iterable[Tensor], size: int) -> None:
        self.size = size
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        first = self.parameters[0]
        places = [0]
        for parameter in self.parameters:
            if parameter.dtype != first.dtype:
                got = f"{first.dtype} and {parameter.dtype}"
                raise ValueError(f"a model on several GPUs must have parameters of one type; got {got}; use one, or one GPU")
            places.append(places[-1] + -(-parameter.numel() // ALIGNED) * ALIGNED)
        self.flat = torch.zeros(places[-1] + 1, dtype=first.dtype, device=first.device)
        self.views = [self.flat[at : at + p.numel()].view_as(p) for at, p in zip(places, self.parameters)]

    def begin(self) -> None:
        self.wait()
        if any(parameter.grad is not view for parameter, view in zip(self.parameters, self.views)):
            self.flat.zero_()
            for parameter, view in zip(self.parameters, self.views):
                parameter.grad = view

    def total(self, scored: Tensor) -> Tensor:
        return self.summed(scored)

    def finish(self, loss: Tensor) -> Tensor:
        self.wait()
        self.flat[-1] = loss
        return self.summed(self.flat)[-1].clone()

    def wait(self) -> None:
        gate()

    def summed(self, tensor: Tensor) -> Tensor:
        """`tensor`, added up over all ranks in place."""
        return sum_(tensor)

    def tensors(self) -> Iterable[Tensor]:
        return (self.flat,)


class Imagined(Replicas):
    """What one of `size` ranks keeps, without the others: for an estimate."""

    def wait(self) -> None: ...

    def summed(self, tensor: Tensor) -> Tensor:
        return tensor


def replicas_of(parameters: Iterable[Tensor]) -> Alone:
    """What adds up the gradients of a new training state."""
    return Replicas(parameters, size()) if together() else Alone()


def equal_start(tensors: Iterable[Any]) -> None:
    """Give all ranks the tensors of rank 0: machines of one run may round differently."""
    if not together():
        return
    with torch.no_grad():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
