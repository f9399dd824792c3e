"""Exact gradients of sequences of any length: piece by piece, each computed again from the state before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase1.config import ModelConfig
from phase1.model import LanguageModel, Outputs, States
from phase1.ops.cross_entropy import IGNORE, USUAL_PARTS
from phase1.training.micro_batch import MicroBatch

PARTS = 16  # of the most logits, of which one is held where the loss comes first: 320 tokens of 50257 in half precision
Gradients = list[Tensor | None]
"""Of the tensors of a state, or of outputs, that gradients go through, in order; None is zero."""


@dataclass
class Piece:
    """A stretch of every sequence of a micro batch, with its weights in the step, and the state before it."""

    inputs: Tensor  # (B, n)
    targets: Tensor  # (B, n)
    share: Tensor  # of the step's scored targets
    part: Tensor  # of the step's tokens
    state: States | None  # None before the first
    rows: Tensor | None = None  # of the table, (B, n, D); None: to be looked up when they are needed
    given: Gradients | None = None  # of its outputs; None: to be found from its loss


def in_pieces(config: ModelConfig, length: int | None) -> bool:
    """Whether a model trains in pieces where `length` is asked for: not with attention, whose state grows, or a user's own."""
    return length is not None and config.mixer == "ar_ssm" and config.model is None


def loss_first(tokens: int, vocab_size: int) -> bool:
    """Whether the loss of so many tokens is computed before all gradients: their rows are at most half a table then."""
    return 2 * tokens <= vocab_size


def bounds(length: int, piece: int) -> list[int]:
    """Where pieces of a sequence begin, and its end: all are `piece` long but the first, which takes what is left over."""
    first = length % piece or piece
    return [0, *range(min(first, length), length + 1, piece)]


def settled(config: ModelConfig, length: int, piece: int) -> int:
    """Tokens of a sequence after which all pieces are alike: states are as long as the windows, and no shorter piece comes."""
    window = max(config.ar_ssm_window, config.copy_window if config.copy_head else 0)
    return min(length, bounds(length, piece)[1] + (math.ceil(window / piece) + 1) * piece)


class Pieces(MicroBatch):
    """The loss and gradients of `MicroBatch`, in the memory of one piece of the sequences and of the states between pieces.

    The forward pass runs the pieces without gradients, and keeps the state after each: the convolutions' inputs, S, keys and
    values of the windows, keys, bias and ids of the copy head. The backward pass takes the pieces from the last to the first:
    a piece is run from the state before it, and its gradients are those of its loss and of the state after it, which the later
    piece has left. Exact, because nothing else crosses a boundary.

    The loss of all pieces comes first, between the two passes, so that the table, its gradient and the logits are gone when
    there are gradients of blocks and activations of a piece. For that the forward pass keeps all rows that are looked up, and
    what the loss is computed from. Where these would be larger than half a table, each piece computes its loss in the backward
    pass, and all share a table and the sum of its gradients.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost", section 4.
    """

    model: LanguageModel

    def __init__(self, model: LanguageModel, scaler: torch.amp.GradScaler, dtype: torch.dtype, length: int) -> None:
        super().__init__(model, scaler, dtype)
        self.length = length
        self.table = SharedTable(model)
        self.loss_first: bool | None = None  # None: where the sequences are short enough
        self._pieces: list[Piece] = []

    def forward(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """As in MicroBatch, but objective and cross-entropy have their value, that of the cross-entropy, after `backward`."""
        edges = bounds(inputs.shape[1], self.length)
        spans = [slice(*pair) for pair in zip(edges, edges[1:])]
        scored = torch.stack([(targets[:, span] != IGNORE).sum() for span in spans])
        shares = share * scored / scored.sum().clamp(min=1)
        self._pieces = [
            Piece(inputs[:, span], targets[:, span], own, part * (span.stop - span.start) / inputs.shape[1], None)
            for span, own in zip(spans, shares)
        ]
        with self._autocast(inputs):
            self.table.build()
        first = self.loss_first
        if loss_first(inputs.numel(), self.model.config.vocab_size) if first is None else first:
            total = self._loss_first(inputs, targets, share)
        else:
            self.table.gather()
            for piece, later in zip(self._pieces, self._pieces[1:]):
                later.state = kept(self._advance(piece.inputs, piece.state))
            total = torch.zeros((), dtype=self.table.wide, device=inputs.device)
        return total, total

    def backward(self, objective: Tensor) -> None:
        """As in MicroBatch, of the last `forward`."""
        gradients: Gradients = []
        waiting: list[tuple[Tensor, Tensor]] = []  # while there are activations, their sum, as large as a table, is not
        while self._pieces:
            piece = self._pieces.pop()
            loss, d_rows, gradients = self._gradients(piece, gradients)
            objective += loss
            if self.table.sum is None:
                waiting.append((piece.inputs, d_rows))
            else:
                self.table.add(piece.inputs, d_rows)
            del piece, d_rows
        while waiting:
            self.table.add(*waiting.pop())
        with self._autocast(objective):
            self.table.backward()

    def _loss_first(self, inputs: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        """The cross-entropy; the pieces are given its gradients for their outputs, and their rows of the table."""
        sizes = [piece.inputs.shape[1] for piece in self._pieces]
        for piece, rows in zip(self._pieces, self.table.lookup(inputs).split(sizes, 1)):
            piece.rows = rows
        loss, gradients = self._loss(self._outputs_of_all(), targets, share)
        for piece, given in zip(self._pieces, zip(*(gradient.split(sizes, 1) for gradient in gradients))):
            piece.given = list(given)
        if not self.table.static:
            with self._autocast(inputs):
                self.table.backward()
        return loss

    def _outputs_of_all(self) -> list[Tensor]:
        """What the loss is computed from; the pieces are given the states before them."""
        outputs: list[list[Tensor]] = []
        for i, piece in enumerate(self._pieces):
            found, after = self._outputs(piece)
            outputs.append(found)
            if i + 1 < len(self._pieces):
                self._pieces[i + 1].state = kept(after)
        return [torch.cat(parts, 1) for parts in zip(*outputs)]

    @torch.no_grad()
    def _outputs(self, piece: Piece) -> tuple[list[Tensor], States]:
        """What the loss of a piece is computed from, and the state after it."""
        assert piece.rows is not None
        with self._autocast(piece.inputs):
            outputs, _, after = self.model.outputs_of_piece(piece.inputs, piece.targets, piece.rows, piece.state)
        return there(outputs), after

    def _loss(self, outputs: list[Tensor], targets: Tensor, share: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The cross-entropy of whole sequences, and its gradients for `outputs`; others are added to what there is."""
        leaves = [part.detach().requires_grad_() for part in outputs]
        loss = self._cross_entropy(Outputs(*leaves), targets, share, PARTS)
        self.table.release()
        self.scaler.scale(loss).backward()
        self.table.collect()
        return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    def _cross_entropy(self, outputs: Outputs, targets: Tensor, share: Tensor, parts: int = USUAL_PARTS) -> Tensor:
        """What tokens of this share add to the cross-entropy of the step."""
        with self._autocast(targets):
            loss = self.model.loss_of_outputs(outputs, self.table.tapped(), targets, parts)
        return torch.where(share > 0, loss, 0.0) * share

    @torch.no_grad()
    def _advance(self, inputs: Tensor, state: States | None) -> States:
        """The state after a piece that follows `state`."""
        with self._autocast(inputs):
            return self.model.state_after_piece(inputs, self.table.lookup(inputs), state)

    def _gradients(self, piece: Piece, later: Gradients) -> tuple[Tensor, Tensor, Gradients]:
        """What `piece` adds to the cross-entropy, 0 where that is known, and the gradients of its rows and the state before it.

        `later` are those of the state after it. Other gradients are added to what there is.
        """
        state, leaves = tracked(piece.state)
        rows = (self.table.lookup(piece.inputs) if piece.rows is None else piece.rows).detach().requires_grad_()
        with self._autocast(piece.inputs):
            outputs, penalty, after = self.model.outputs_of_piece(piece.inputs, piece.targets, rows, state)
        objective = loss = torch.zeros((), dtype=self.table.wide, device=rows.device)
        if piece.given is None:
            objective = loss = self._cross_entropy(outputs, piece.targets, piece.share)
        if penalty is not None:
            objective = objective + penalty * piece.part
        given = [*zip(there(outputs), piece.given or []), *zip(floating(after), later)]
        ends: list[tuple[Tensor, Tensor | None]]
        ends = [(end, gradient) for end, gradient in given if end.requires_grad and gradient is not None]
        if objective.requires_grad:
            ends.append((self.scaler.scale(objective), None))
        torch.autograd.backward([end for end, _ in ends], [gradient for _, gradient in ends])
        assert rows.grad is not None
        self.table.collect()
        return loss.detach(), rows.grad, [leaf.grad for leaf in leaves]


class SharedTable:
    """The token table of a step that many pieces use: their gradients for it are summed up, and go on from there once."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.wide = torch.promote_types(self.model.norm.weight.dtype, torch.float32)  # of sums
        self.static = False  # whether the tensors stay the same ones, as CUDA graphs need
        self.size = torch.Size()
        self.rows: Tensor | None = None  # without gradients
        self.sum: Tensor | None = None  # of the gradients
        self._left: list[Tensor] = []  # by what `tapped` has given

    @torch.no_grad()
    def build(self) -> None:
        """Make the table, of the parameters as they are."""
        table = self.model.table_of_loss()
        if self.rows is None:
            self.rows, self.size = table.detach(), table.shape
            if self.static:
                self.gather()
        else:
            self.rows.copy_(table)

    def gather(self) -> None:
        """Be ready for many gradients, whose sum needs more than half precision."""
        assert self.rows is not None
        if self.sum is None:
            self.sum = torch.zeros_like(self.rows, dtype=self.wide)

    def lookup(self, inputs: Tensor) -> Tensor:
        """Rows of the table, without gradients."""
        assert self.rows is not None
        return self.model.lookup(inputs, self.rows)

    def tapped(self) -> Tensor:
        """The table; its gradients wait for `collect`."""
        assert self.rows is not None
        tapped: Tensor = _Tap.apply(torch.zeros((), requires_grad=True), self.rows, self._left)
        return tapped

    def release(self) -> None:
        """Forget the table, but not its gradients."""
        if not self.static:
            self.rows = None

    def collect(self) -> None:
        """Take the gradient that a loss has left, if any has."""
        while self._left:
            gradient = self._left.pop()
            self.sum = gradient if self.sum is None else self.sum.add_(gradient)

    def add(self, inputs: Tensor, d_rows: Tensor) -> None:
        """Take the gradient of the rows of `inputs`."""
        if self.sum is None:
            self.sum = d_rows.new_zeros(self.size)
        rows = self.model.embedding.rows_of(inputs).flatten()
        self.sum.index_put_((rows,), d_rows.flatten(0, 1).to(self.sum.dtype), accumulate=True)

    def backward(self) -> None:
        """Add the gradients of the parameters that make the table, and forget it."""
        table = self.model.table_of_loss()
        assert self.sum is not None
        end: Tensor = _Seed.apply(table, [self.sum.to(table.dtype)])
        del table
        if not self.static:
            self.rows = self.sum = None
        end.backward()
        self.clear()

    def clear(self) -> None:
        """As before the first piece."""
        if not self.static:
            self.rows = self.sum = None
        elif self.sum is not None:
            self.sum.zero_()


class _Tap(torch.autograd.Function):
    """A tensor whose gradients are put aside: unlike a leaf it may be gone before they come."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, tensor: Tensor, left: list[Tensor]) -> Tensor:
        ctx.left = left
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.left.append(gradient)
        return None, None, None


class _Seed(torch.autograd.Function):
    """The end that gives a tensor its gradient, and holds on to neither in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None


def there(outputs: Outputs) -> list[Tensor]:
    """The outputs that there are."""
    return [part for part in outputs if part is not None]


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
