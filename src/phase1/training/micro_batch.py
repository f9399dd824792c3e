"""Forward and backward pass of one micro batch: as they are, or replayed as CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from phase1.model import LanguageModel
from phase1.parallel.group import together
from phase1.trainable import Trainable

WARMUP_RUNS = 3  # before a capture: libraries make their handles, compiled models their kernels


class MicroBatch:
    """Loss and gradients of a micro batch, in autocast, the loss scaled for the backward pass."""

    def __init__(self, model: Trainable, scaler: torch.amp.GradScaler, dtype: torch.dtype) -> None:
        self.model, self.scaler, self.dtype = model, scaler, dtype

    def forward(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """The objective and the cross-entropy that the micro batch adds to those of its step, scalars.

        The cross-entropy is `share` times the mean over `targets`, 0 if none is scored; the objective is that and `part` times
        the penalty of the rank gate.
        """
        with self._autocast(inputs):
            loss, penalty = self.model.losses(inputs, targets)
        loss = torch.where(share > 0, loss, 0.0) * share
        return loss if penalty is None else loss + penalty * part, loss

    def backward(self, objective: Tensor) -> None:
        """Add the gradients of `objective`, times the loss scale, to those of the parameters."""
        self.scaler.scale(objective).backward()

    def _autocast(self, inputs: Tensor) -> torch.autocast:
        # a model of ours uses each weight once: keeping those cast would add all of them to the peak
        kept = not isinstance(self.model, LanguageModel)
        return torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=kept)


class GraphedMicroBatch(MicroBatch):
    """The same work as two CUDA graphs, launched at once, so that the host no longer limits the speed.

    The first batch of a shape runs a few times and is then captured, so gradients must be None or zero before it. From
    then on they stay the same tensors: zero them, never free them. The memory of the activations stays reserved.
    """

    def __init__(self, eager: MicroBatch) -> None:
        super().__init__(eager.model, eager.scaler, eager.dtype)
        self._inputs: tuple[Tensor, ...] = ()  # what the graphs read
        self._outputs: tuple[Tensor, Tensor] | None = None  # what they write
        self._held: list[int] = []  # where the gradients are that they add to

    def forward(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """As in MicroBatch; the result is valid until the next call."""
        given = inputs, targets, share, part
        if [tensor.shape for tensor in self._inputs] != [tensor.shape for tensor in given]:
            self._inputs, self._outputs = (), None
            self._capture(*(tensor.clone() for tensor in given))
        require_same_gradients(self._held, self.model)
        for mine, new in zip(self._inputs, given):
            mine.copy_(new)
        self._forward.replay()
        assert self._outputs is not None
        return self._outputs

    def backward(self, objective: Tensor) -> None:
        """As in MicroBatch, of the last `forward`."""
        assert self._outputs is not None and objective is self._outputs[0]
        self._backward.replay()

    def _capture(self, *inputs: Tensor) -> None:
        with beside():
            for _ in range(WARMUP_RUNS):
                super().backward(super().forward(*inputs)[0])
        self.model.zero_grad(set_to_none=False)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        mode = capture_mode()
        with torch.cuda.graph(self._forward, capture_error_mode=mode):
            objective, loss = super().forward(*inputs)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode=mode):
            add_gradients(self.scaler.scale(objective), self.model)
        self._inputs, self._outputs = inputs, (objective.detach(), loss.detach())
        self._held = places_of_gradients(self.model)


@contextmanager
def beside() -> Iterator[None]:
    """Within the block, the GPU's work goes to a stream of its own, as a capture's does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture_mode() -> str:
    """Whose other work ends a capture: with other ranks, a thread of NCCL asks for the end of earlier sums meanwhile."""
    return "thread_local" if together() else "global"


def places_of_gradients(model: torch.nn.Module) -> list[int]:
    """Where the gradient of each parameter is in memory, 0 without one."""
    return [0 if parameter.grad is None else parameter.grad.data_ptr() for parameter in model.parameters()]


def require_same_gradients(places: list[int], model: torch.nn.Module) -> None:
    """A graph would add to freed memory, and an optimizer find nothing, where gradients were freed since its capture."""
    moved = any(was and was != now for was, now in zip(places, places_of_gradients(model), strict=True))
    assert not moved, "gradients that graphs add to are zeroed, never freed"


def add_gradients(objective: Tensor, model: torch.nn.Module) -> None:
    """`objective.backward()` for parameters that have gradients already: all are added to at once, in few launches."""
    held = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    new = torch.autograd.grad(objective, [parameter for parameter, _ in held], allow_unused=True)
    pairs = [(old, gradient) for (_, old), gradient in zip(held, new, strict=True) if gradient is not None]
    whole = [(old, gradient) for old, gradient in pairs if gradient.is_contiguous()]
    torch._foreach_add_([old for old, _ in whole], [gradient for _, gradient in whole])
    for old, gradient in pairs:
        if not gradient.is_contiguous():  # among the others it would split them all
            old.add_(gradient)
