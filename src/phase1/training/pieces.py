"""Exact gradients of sequences of any length: piece by piece, each computed again from the state before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase1.config import ModelConfig
from phase1.model import LanguageModel, States
from phase1.ops.cross_entropy import IGNORE
from phase1.training.micro_batch import MicroBatch

Gradients = list[Tensor | None]
"""Of the tensors of a state that gradients go through, in order; None is zero."""


@dataclass(frozen=True)
class Piece:
    """A stretch of every sequence of a micro batch, with its weights in the step, and the state before it."""

    inputs: Tensor  # (B, n)
    targets: Tensor  # (B, n)
    share: Tensor  # of the step's scored targets
    part: Tensor  # of the step's tokens
    state: States | None  # None before the first


def in_pieces(config: ModelConfig, length: int | None) -> bool:
    """Whether a model trains in pieces where `length` is asked for: not with attention, whose state grows, or a user's own."""
    return length is not None and config.mixer == "ar_ssm" and config.model is None


def bounds(length: int, piece: int) -> list[int]:
    """Where pieces of a sequence begin, and its end: all are `piece` long but the first, which takes what is left over."""
    first = length % piece or piece
    return [0, *range(min(first, length), length + 1, piece)]


class Pieces(MicroBatch):
    """The loss and gradients of `MicroBatch`, in the memory of one piece of the sequences and of the states between pieces.

    The forward pass runs all pieces but the last, without their output, and keeps the state after each: the convolutions'
    inputs, S, keys and values of the windows, keys, bias and ids of the copy head. The backward pass takes the pieces from the
    last to the first: a piece is run from the state before it, and its gradients are those of its own loss and of the state
    after it, which the later piece has left. Exact, because nothing else crosses a boundary. The table is built once for all
    pieces.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost", section 4.
    """

    model: LanguageModel

    def __init__(self, model: LanguageModel, scaler: torch.amp.GradScaler, dtype: torch.dtype, length: int) -> None:
        super().__init__(model, scaler, dtype)
        self.length = length
        self.table = SharedTable(model)
        self._pieces: list[Piece] = []

    def forward(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """As in MicroBatch, but objective and cross-entropy have their value, that of the cross-entropy, after `backward`."""
        edges = bounds(inputs.shape[1], self.length)
        spans = [slice(*pair) for pair in zip(edges, edges[1:])]
        scored = torch.stack([(targets[:, span] != IGNORE).sum() for span in spans])
        shares = share * scored / scored.sum().clamp(min=1)
        with self._autocast(inputs):
            self.table.build()
        self._pieces, state = [], None
        for span, own in zip(spans, shares):
            piece = Piece(inputs[:, span], targets[:, span], own, part * (span.stop - span.start) / inputs.shape[1], state)
            self._pieces.append(piece)
            if span.stop < inputs.shape[1]:
                state = kept(self._advance(piece.inputs, state))
        total = torch.zeros((), dtype=self.table.wide, device=inputs.device)
        return total, total

    def backward(self, objective: Tensor) -> None:
        """As in MicroBatch, of the last `forward`."""
        gradients: Gradients = []
        while self._pieces:
            loss, gradients = self._gradients(self._pieces.pop(), gradients)
            objective += loss
        with self._autocast(objective):
            self.table.backward()

    @torch.no_grad()
    def _advance(self, inputs: Tensor, state: States | None) -> States:
        """The state after a piece that follows `state`."""
        assert self.table.leaf is not None
        with self._autocast(inputs):
            return self.model.state_after_piece(inputs, self.table.leaf, state)

    def _gradients(self, piece: Piece, later: Gradients) -> tuple[Tensor, Gradients]:
        """What `piece` adds to the cross-entropy, and the gradients of the state before it, for those of the state after it.

        Those of the parameters and the table are added to what there is.
        """
        assert self.table.leaf is not None
        state, leaves = tracked(piece.state)
        with self._autocast(piece.inputs):
            loss, penalty, after = self.model.losses_of_piece(piece.inputs, piece.targets, self.table.leaf, state)
        loss = torch.where(piece.share > 0, loss, 0.0) * piece.share
        ends: list[Tensor] = [self.scaler.scale(loss if penalty is None else loss + penalty * piece.part)]
        given: Gradients = [None]
        for end, gradient in zip(floating(after), later):
            if gradient is not None and end.requires_grad:
                ends.append(end)
                given.append(gradient)
        torch.autograd.backward(ends, given)
        self.table.collect()
        return loss.detach(), [leaf.grad for leaf in leaves]


class SharedTable:
    """The token table of a step that many pieces use: their gradients for it are summed up, and go on from there once."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.wide = torch.promote_types(model.norm.weight.dtype, torch.float32)  # of sums
        self.static = False  # whether the tensors stay the same ones, as CUDA graphs need
        self.leaf: Tensor | None = None  # what pieces take
        self.sum: Tensor | None = None  # None where the table is a parameter, whose gradient sums up itself

    @torch.no_grad()
    def build(self) -> None:
        """Make the table, of the parameters as they are."""
        table = self.model.table()
        if table.requires_grad:
            self.leaf = table
        elif self.leaf is None:
            self.leaf = table.requires_grad_()
            self.sum = torch.zeros_like(table, dtype=self.wide) if self.static else None
        else:
            self.leaf.copy_(table)

    def collect(self) -> None:
        """Take what a piece has left."""
        if self.leaf is None or isinstance(self.leaf, torch.nn.Parameter) or self.leaf.grad is None:
            return
        self.sum = self.leaf.grad.to(self.wide) if self.sum is None else self.sum.add_(self.leaf.grad)
        self.leaf.grad = None

    def backward(self) -> None:
        """Add the gradients of the parameters that make the table, and forget it."""
        if self.sum is not None:
            table = self.model.table()
            table.backward(self.sum.to(table.dtype))
        self.clear()

    def clear(self) -> None:
        """As before the first piece."""
        if not self.static:
            self.leaf = self.sum = None
        elif self.sum is not None:
            self.sum.zero_()


def tensors(states: States | None) -> list[Tensor]:
    """Every tensor of a state, in order; of none, none."""
    return [] if states is None else [part for layer in states for part in layer if isinstance(part, Tensor)]


def floating(states: States | None) -> list[Tensor]:
    """Those that gradients go through."""
    return [part for part in tensors(states) if part.is_floating_point()]


def rebuilt(states: States | None, parts: Sequence[Tensor]) -> States | None:
    """`states` with `parts` in place of its tensors."""
    if states is None:
        return None
    left = iter(parts)

    def taken(part: Any) -> Any:
        return next(left) if isinstance(part, Tensor) else part

    return [layer._make(map(taken, layer)) for layer in states]


def kept(states: States) -> States | None:
    """A copy of a state, without the larger tensors that parts of it may be views of."""
    return rebuilt(states, [part.clone(memory_format=torch.contiguous_format) for part in tensors(states)])


def tracked(states: States | None) -> tuple[States | None, list[Tensor]]:
    """A state whose tensors gather their gradients, and these tensors."""
    parts = [part.detach().requires_grad_() if part.is_floating_point() else part for part in tensors(states)]
    return rebuilt(states, parts), [part for part in parts if part.is_floating_point()]
