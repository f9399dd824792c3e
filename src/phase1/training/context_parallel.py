"""Context parallel: one sequence over several ranks, each with a stretch of it, with exact gradients."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1.model import LanguageModel, States
from phase1.ops.ar_ssm import TAPS, State, fused_ar_ssm, fused_runs
from phase1.parallel.group import stacked, sum_
from phase1.training.micro_batch import MicroBatch


def faded(dtype: torch.dtype) -> float:
    """x where e^-x of a state is nothing beside it: a quarter of what its inputs, of that type, are rounded by."""
    return math.log(8 / torch.finfo(dtype).eps)


class Context:
    """What positions on earlier ranks leave for those on this one, asked for layer by layer while all ranks compute at once.

    A rank knows the state that its own stretch leaves from nothing, B, and by how much the stretch decays what came before,
    A = exp(Σ log a): both follow from its own inputs. So one exchange a layer gives every rank the state before its stretch,
    S_r = Σ_{j<r} (Π_{j<i<r} A_i) B_j, with the inputs of the convolution and the keys and values of the window, and none waits
    for another's result. Gradients take the same way back: all-gathered tensors get the sum of what all ranks have for them.
    All ranks must call the same functions in the same order; stretches may have any lengths.

    A state fades to 1/e in `memory` positions at least. Of a stretch that is longer than 9 times that (7 in bfloat16, 18 in
    float32, 38 in float64) B is taken from its last positions alone, for what comes before them is nothing beside the rounding
    of B's inputs. Where one is shorter, B depends on the convolution's inputs from the rank before, which an exchange of their
    own brings first.

    Source: Sun et al. 2024, "Linear attention sequence parallelism", section 2; Dao and Gu 2024, section 8.2.
    """

    def __init__(self, lengths: Sequence[int], rank: int) -> None:
        """lengths: of the stretches of all ranks, in order, 1 or more."""
        self.lengths, self.rank = tuple(lengths), rank
        self.start = sum(lengths[:rank])  # first position of this rank

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's stretch of sequences (B, T)."""
        return tensor[:, self.start : self.start + self.lengths[self.rank]].contiguous()

    def states(self, model: LanguageModel) -> States:
        """What `losses` takes as the state before this rank's stretch."""
        return [self.of_mixer] * len(model.blocks) + [self.of_copy_head] * (model.copy_head is not None)

    def of_mixer(self, mixer: "Mixer", proj: Tensor) -> tuple[Tensor, State]:
        """The projected inputs of an AR-SSM layer, to be used from here on, and the state before this rank's stretch."""
        long = min(self._first(mixer, proj, length) for length in self.lengths) >= TAPS - 1
        first = self._first(mixer, proj, proj.shape[1])
        proj, end = _WithEnd.apply(proj, proj.shape[1] - first + TAPS - 1) if long else (proj, proj)
        taps = _last(end[..., : mixer.channels], 1, TAPS - 1)
        conv = None if long else self._inputs(self._gathered(taps))
        S, k, x, log_decay = self._left(mixer, end, conv, first)
        n, wide = max(0, mixer.window - 1), torch.promote_types(proj.dtype, torch.float32)
        parts = [S, _last(k, 2, n), _last(x, 2, n), log_decay, taps]
        everywhere = self._gathered(torch.cat([part.flatten(1).to(wide) for part in parts], 1))
        S, k, x, log_decay, taps = (
            part.unflatten(2, own.shape[1:]) for part, own in zip(everywhere.split([p[0].numel() for p in parts], 2), parts)
        )
        keys, values = (self._earlier(part, 3, n).to(proj.dtype) for part in (k, x))
        conv = self._inputs(taps).to(proj.dtype) if conv is None else conv
        S = (S * self._decay(log_decay)[..., None, None]).sum(0)
        return proj, State(self.start, conv, S, keys, values)

    def _first(self, mixer: "Mixer", proj: Tensor, length: int) -> int:
        """The first position of a stretch that its state still depends on."""
        return max(0, length - max(math.ceil(faded(proj.dtype) * mixer.memory), mixer.window))

    def _inputs(self, taps: Tensor) -> Tensor:
        """The convolution's inputs before this rank, zeros at the beginning, from the ends of all, (N, B, TAPS - 1, ·)."""
        rows = self._earlier(taps, 2, TAPS - 1)
        return F.pad(rows, (0, 0, TAPS - 1 - rows.shape[1], 0))

    def _left(self, mixer: "Mixer", end: Tensor, conv: Tensor | None, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S after this rank's stretch from nothing before it, its last keys and values, and its log decay (B, H).

        Positions from `first` on count. Without the inputs before the stretch, `conv`, `end` holds them and TAPS - 1 before;
        with them, the whole stretch.
        """
        (H, R), P = mixer.operator_parameters().q_scale.shape, mixer.state_scale.shape[1]
        wide, before = torch.promote_types(end.dtype, torch.float32), TAPS - 1 if conv is None else first
        inputs = end[:, max(0, before - TAPS + 1) : before, : mixer.channels]
        if conv is not None:
            inputs = torch.cat([conv, inputs], 1)[:, -(TAPS - 1) :]
        none = end.new_zeros(len(end), H, R, P, dtype=wide)
        k, x = (end.new_empty(len(end), H, 0, width) for width in (R, P))
        nothing = State(self.start + first, inputs, none, k, x)
        proj, p = end[:, before:], mixer.operator_parameters()
        if first and fused_runs(proj, p, mixer.window):
            _, left, _ = fused_ar_ssm(proj, p, window=mixer.window, memory=mixer.memory, state=nothing)
            return left.S, left.k, left.x, none.new_full((len(proj), H), -torch.inf)
        o, _, _ = mixer.operands(proj, nothing)
        total = o.log_decay.to(wide).cumsum(1)
        weighed = o.v * (total[:, -1:] - total).exp()[..., None]
        with torch.autocast(proj.device.type, enabled=False):
            S = torch.einsum("bthr,bthp->bhrp", weighed.to(wide), (o.x * o.dt[..., None]).to(wide))
        log_decay = none.new_full((len(proj), H), -torch.inf) if first else total[:, -1]
        return S, o.k.transpose(1, 2), o.x.transpose(1, 2), log_decay

    def of_copy_head(self, head: Any, k: Tensor, prev_key: Tensor, bias: Tensor, ids: Tensor) -> Any:
        """The state of the copy head before this rank's stretch, as `MakesState` says."""
        last = prev_key[:, -1:]
        before = (self._gathered(last)[max(0, self.rank - 1)] * (self.rank > 0)).to(k.dtype)
        k = k + torch.cat([before, prev_key], 1)[:, :-1]
        own = head.state_of(k, bias, ids, last)
        n, wide = min(head.window, max(self.lengths)), bias.dtype
        parts = [_last(own.k, 1, n), _last(own.bias, 1, n), bias[:, -1:]]
        everywhere = self._gathered(torch.cat([part.flatten(1).to(wide) for part in parts], 1))
        k, own_bias, total = everywhere.split([part[0].numel() for part in parts], 2)
        # Σ f of the whole ranks between the keys and this one
        between = torch.stack([total[j + 1 : self.rank].sum(0) for j in range(len(self.lengths))])
        k = self._earlier(k.unflatten(2, (n, -1)), 2, head.window).to(own.k.dtype)
        bias = self._earlier(own_bias - between, 2, head.window)
        with torch.no_grad():
            tokens = self._earlier(self._gathered(_last(ids, 1, n)), 2, head.window)
        return own._replace(prev_key=before, k=k, bias=bias, ids=tokens)

    def _decay(self, log_decay: Tensor) -> Tensor:
        """What is left at this rank of the state after each stretch, 0 of later ones; from all log decays, (N, B, H) each."""
        left = [log_decay[j + 1 : self.rank].sum(0).exp() for j in range(self.rank)]
        return torch.stack([*left, *[torch.zeros_like(log_decay[0])] * (len(self.lengths) - self.rank)])

    def _earlier(self, tails: Tensor, dim: int, n: int) -> Tensor:
        """The last n rows before this rank, or what there is, from the ends of all stretches, (N, B, ...), rows in `dim`."""
        size = tails.shape[dim]
        rows = [
            tail.narrow(dim - 1, size - min(size, length), min(size, length))
            for tail, length in zip(tails[: self.rank], self.lengths)
        ]
        # of none, but a part of the graph: all ranks go through every exchange in the backward pass
        joined = torch.cat(rows, dim - 1) if rows else tails[0].narrow(dim - 1, 0, 0)
        return joined.narrow(dim - 1, max(0, joined.shape[dim - 1] - n), min(n, joined.shape[dim - 1]))

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, (N, ...)."""
        gathered: Tensor = _Gathered.apply(tensor, self.rank)
        return gathered


class ContextMicroBatch(MicroBatch):
    """Loss and gradients of a micro batch whose sequences are spread over the ranks: this one gets its stretch of each.

    The gradients of the parameters are this rank's part: their sum over all ranks is that of the sequences. `share` and `part`
    are of the step of all ranks.
    """

    model: LanguageModel

    def __init__(self, whole: MicroBatch, context: Context) -> None:
        assert type(whole) is MicroBatch, f"a stretch is trained whole and eagerly, not by {type(whole).__name__}"
        super().__init__(whole.model, whole.scaler, whole.dtype)
        if not isinstance(whole.model, LanguageModel) or whole.model.config.mixer != "ar_ssm":
            raise ValueError("context parallel needs a state that does not grow; got another model; take --mixer ar_ssm")
        self.context = context

    def forward(self, inputs: Tensor, targets: Tensor, share: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """As in MicroBatch, of this rank's stretches, (B, T_r)."""
        with self._autocast(inputs):
            loss, penalty = self.model.losses(inputs, targets, self.context.states(self.model))
        loss = torch.where(share > 0, loss, 0.0) * share
        return loss if penalty is None else loss + penalty * part, loss


class Mixer(Protocol):
    """What is used of an AR-SSM layer."""

    channels: int
    window: int
    memory: int
    state_scale: Tensor

    def operator_parameters(self) -> Any: ...

    def operands(self, proj: Tensor, state: State | None) -> Any: ...


class _Gathered(torch.autograd.Function):
    """All-gather; backward a rank gets the sum of all ranks' gradients for its tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rank: int) -> Tensor:
        ctx.rank = rank
        return stacked(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # it may be used elsewhere too
        return sum_(gradient)[ctx.rank], None


class _WithEnd(torch.autograd.Function):
    """A tensor (B, T, ...) and a copy of its last n positions, whose gradient is added where it belongs.

    That of a slice would be a tensor as large as the whole, of zeros but for the slice, and added to the whole's.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return tensor.view_as(tensor), _last(tensor, 1, n).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_end: Tensor) -> tuple[Tensor, None]:
        n = of_end.shape[1]
        _last(gradient, 1, n).add_(of_end)  # in place: a layer uses the tensor once, so nobody else holds its gradient
        return gradient, None


def _last(tensor: Tensor, dim: int, n: int) -> Tensor:
    """The last n rows in `dim`, with zeros before them where there are fewer."""
    rows = tensor.narrow(dim, max(0, tensor.shape[dim] - n), min(n, tensor.shape[dim]))
    missing = n - rows.shape[dim]
    return rows if not missing else F.pad(rows, [0, 0] * (tensor.ndim - 1 - dim) + [missing, 0])


def stretches(length: int, ranks: int) -> list[int]:
    """Lengths of `ranks` stretches of a sequence, as equal as can be. Raises ValueError for more ranks than tokens."""
    if length < ranks:
        raise ValueError(f"a sequence over {ranks} ranks must have as many tokens; got {length}; start fewer ranks")
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]
