"""Pieces of sequences as CUDA graphs: per shape one for the state after a piece, and one for its gradients."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from phase1.model import States
from phase1.training.micro_batch import WARMUP_RUNS, beside, capture_mode, places_of_gradients, require_same_gradients
from phase1.training.pieces import Gradients, Piece, Pieces, bounds, floating, loss_first, rebuilt, settled, tensors


class Launched:
    """A function of tensors as one graph, captured for the shapes of `inputs`, at which it has run before.

    What a call returns holds until the next launch of a graph of the same `pool`.
    """

    def __init__(self, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode=capture_mode()):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs


class GraphedPieces(Pieces):
    """The same work as `Pieces`, each piece launched at once: all of a sequence but the first have one shape.

    Graphs are captured in the first forward pass of a shape, after its first pieces have been run as they are: then the memory
    of an activation is there once, not beside that of a graph. Gradients must be None or zero before. From then on they stay
    the same tensors: zero them, never free them. Memory of a piece, of the table and of its gradient stays reserved.
    """

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces.model, pieces.scaler, pieces.dtype, pieces.length)
        self.table.static = True
        self._graphs: dict[Any, Launched] = {}
        self._after: dict[Any, States] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._held: list[int] = []
        self._warm: set[Any] = set()  # kinds of pieces that have been run

    def forward(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """As in Pieces."""
        before = len(self._graphs)
        if before:
            require_same_gradients(self._held, self.model)
        if warms := self._kinds(inputs) not in self._warm:
            self._warm.add(self._kinds(inputs))
            with beside():
                self._warm_up(inputs, targets, share, part)
        outcome = super().forward(inputs, targets, share, part)
        for piece in self._pieces:
            if _key("gradients", piece.inputs, piece.state, piece.given) not in self._graphs:
                self._gradients(piece, [])
        if warms or len(self._graphs) > before:  # which have left gradients
            self.model.zero_grad(set_to_none=False)
            self.table.clear()
            self._held = places_of_gradients(self.model)
            outcome = super().forward(inputs, targets, share, part)
        return outcome

    def _kinds(self, inputs: Tensor) -> Any:
        """What decides the shapes of pieces, and where their loss is computed."""
        B, T = inputs.shape
        end = settled(self.model.config, T, self.length)
        return B, bounds(T, self.length)[1], end, loss_first(B * T, self.model.config.vocab_size)

    def _warm_up(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> None:
        """Run one piece of every kind as it is: libraries make their handles, and compiled functions their kernels."""
        plain = Pieces(self.model, self.scaler, self.dtype, self.length)
        *_, end, plain.loss_first = self._kinds(inputs)
        for _ in range(WARMUP_RUNS):
            plain.backward(plain.forward(inputs[:, :end], targets[:, :end], share, part)[0])

    def _launch(self, key: Any, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
        if key not in self._graphs:
            self._graphs[key] = Launched(function, inputs, self._pool)
        return self._graphs[key](*inputs)

    def _advance(self, inputs: Tensor, state: States | None) -> States:
        key = _key("state", inputs, state)

        def function(ids: Tensor, *parts: Tensor) -> list[Tensor]:
            self._after[key] = super(GraphedPieces, self)._advance(ids, rebuilt(state, parts))
            return tensors(self._after[key])

        found = self._launch(key, function, [inputs, *tensors(state)])
        return rebuilt(self._after[key], found)  # type: ignore[return-value]

    def _outputs(self, piece: Piece) -> tuple[list[Tensor], States]:
        key = _key("outputs", piece.inputs, piece.state)
        assert piece.rows is not None

        def function(ids: Tensor, targets: Tensor, rows: Tensor, *parts: Tensor) -> list[Tensor]:
            one = replace(piece, inputs=ids, targets=targets, rows=rows, state=rebuilt(piece.state, parts))
            outputs, self._after[key] = super(GraphedPieces, self)._outputs(one)
            return [*outputs, *tensors(self._after[key])]

        found = self._launch(key, function, [piece.inputs, piece.targets, piece.rows, *tensors(piece.state)])
        ends = len(found) - len(tensors(self._after[key]))
        outputs = [part.clone() for part in found[:ends]]
        return outputs, rebuilt(self._after[key], found[ends:])  # type: ignore[return-value]

    def _loss(self, outputs: list[Tensor], targets: Tensor, share: Tensor) -> tuple[Tensor, list[Tensor]]:
        def function(targets: Tensor, share: Tensor, *outputs: Tensor) -> list[Tensor]:
            loss, gradients = super(GraphedPieces, self)._loss(list(outputs), targets, share)
            return [loss, *gradients]

        loss, *gradients = self._launch(_key("loss", targets, None), function, [targets, share, *outputs])
        return loss.clone(), [gradient.clone() for gradient in gradients]

    def _gradients(self, piece: Piece, later: Gradients) -> tuple[Tensor, Tensor, Gradients]:
        key = _key("gradients", piece.inputs, piece.state, piece.given)
        optional = [] if piece.rows is None or piece.given is None else [piece.rows, *map(_there, piece.given)]
        own = [piece.inputs, piece.targets, piece.share, piece.part, *optional, *tensors(piece.state)]
        if key in self._graphs:
            ends = self._graphs[key].inputs[len(own) :]
        else:
            after = self._outputs(piece)[1] if optional else super()._advance(piece.inputs, piece.state)
            ends = [torch.zeros_like(part) for part in floating(after)]
        later = later or [None] * len(ends)
        zeros = [torch.zeros_like(end) if gradient is None else gradient for end, gradient in zip(ends, later, strict=True)]

        def function(ids: Tensor, targets: Tensor, share: Tensor, part: Tensor, *more: Tensor) -> list[Tensor]:
            given, parts = more[: len(optional)], more[len(optional) : len(own) - 4]
            one = Piece(ids, targets, share, part, rebuilt(piece.state, parts))
            if given:
                one.rows, one.given = given[0], list(given[1:])
            loss, d_rows, gradients = super(GraphedPieces, self)._gradients(one, list(more[len(own) - 4 :]))
            pairs = zip(floating(one.state), gradients, strict=True)
            return [loss, d_rows, *(torch.zeros_like(part) if gradient is None else gradient for part, gradient in pairs)]

        loss, d_rows, *gradients = self._launch(key, function, [*own, *zeros])
        return loss, d_rows, list(gradients)


def _there(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def _key(name: str, inputs: Tensor, state: States | None, given: Gradients | None = None) -> Any:
    return name, given is None, inputs.shape, *(part.shape for part in tensors(state))
