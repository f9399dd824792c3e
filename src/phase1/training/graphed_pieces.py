"""Pieces of sequences as CUDA graphs: per shape one for the state after a piece, and one for its gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phase1.model import States
from phase1.training.micro_batch import WARMUP_RUNS
from phase1.training.pieces import Gradients, Piece, Pieces, floating, rebuilt, tensors


class Launched:
    """A function of tensors as one graph, captured for the shapes of `inputs` after some runs that warm up.

    What a call returns holds until the next launch of a graph of the same `pool`.
    """

    def __init__(self, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUP_RUNS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs


class GraphedPieces(Pieces):
    """The same work as `Pieces`, each piece launched at once: all of a sequence but the first have one shape.

    Graphs are captured in a forward pass, so gradients must be None or zero before the first one of a shape. From then on they
    stay the same tensors: zero them, never free them. Memory of a piece, of the table and of its gradient stays reserved.
    """

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces.model, pieces.scaler, pieces.dtype, pieces.length)
        self.table.static = True
        self._graphs: dict[Any, Launched] = {}
        self._after: dict[Any, States] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def forward(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """As in Pieces."""
        outcome = super().forward(inputs, targets, share, part)
        new = [piece for piece in self._pieces if _key("gradients", piece.inputs, piece.state) not in self._graphs]
        for piece in new:
            self._gradients(piece, [])
        if new:
            self.model.zero_grad(set_to_none=False)
            self.table.clear()
        return outcome

    def _advance(self, inputs: Tensor, state: States | None) -> States:
        key, given = _key("state", inputs, state), [inputs, *tensors(state)]
        if key not in self._graphs:

            def function(ids: Tensor, *parts: Tensor) -> list[Tensor]:
                self._after[key] = super(GraphedPieces, self)._advance(ids, rebuilt(state, parts))
                return tensors(self._after[key])

            self._graphs[key] = Launched(function, given, self._pool)
        return rebuilt(self._after[key], self._graphs[key](*given))  # type: ignore[return-value]

    def _gradients(self, piece: Piece, later: Gradients) -> tuple[Tensor, Gradients]:
        key = _key("gradients", piece.inputs, piece.state)
        given = [piece.inputs, piece.targets, piece.share, piece.part, *tensors(piece.state)]
        if key not in self._graphs:
            ends = floating(super()._advance(piece.inputs, piece.state))

            def function(*given: Tensor) -> list[Tensor]:
                start = len(given) - len(ends)
                one = Piece(given[0], given[1], given[2], given[3], rebuilt(piece.state, given[4:start]))
                loss, gradients = super(GraphedPieces, self)._gradients(one, list(given[start:]))
                own = zip(floating(one.state), gradients, strict=True)
                return [loss, *(torch.zeros_like(part) if gradient is None else gradient for part, gradient in own)]

            self._graphs[key] = Launched(function, [*given, *map(torch.zeros_like, ends)], self._pool)
        graph = self._graphs[key]
        ends = graph.inputs[len(given) :]
        later = later or [None] * len(ends)
        zeros = [torch.zeros_like(end) if gradient is None else gradient for end, gradient in zip(ends, later, strict=True)]
        loss, *gradients = graph(*given, *zeros)
        return loss, list(gradients)


def _key(name: str, inputs: Tensor, state: States | None) -> Any:
    return name, inputs.shape, *(part.shape for part in tensors(state))
