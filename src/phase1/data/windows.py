"""Which windows of the training text make which optimizer step: a pure function of the step."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows of T tokens in an order that only `seed` decides; every epoch has an order of its own.

    Window i is number i mod n of epoch i // n, where n = (N - 1) // T; each window is seen once per epoch.
    Raises ValueError where the N ids are too few for one window and its last target.
    """

    ids: np.ndarray = field(repr=False, compare=False)
    seq_length: int
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seq_length < 1 or len(self.ids) <= self.seq_length:
            raise ValueError(
                f"the text must have at least --seq-length + 1 = {max(self.seq_length, 1) + 1} tokens; got {len(self.ids)} "
                f"and --seq-length {self.seq_length}; use a longer text or another --seq-length"
            )

    def __len__(self) -> int:
        """n, windows per epoch."""
        return (len(self.ids) - 1) // self.seq_length

    def window(self, i: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of window i, counted over all epochs: (T,) int64 each, targets one token later."""
        epoch, place = divmod(i, len(self))
        start = int(self._order(epoch)[place]) * self.seq_length
        tokens = torch.from_numpy(self.ids[start : start + self.seq_length + 1].astype(np.int64))
        return tokens[:-1], tokens[1:]

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of optimizer step `step`, from 0: windows step·B to step·B + B - 1, (B, T) int64 each.

        Rank r of N has step N·step + r of B/N windows: together they have those of step `step` of B.
        """
        pairs = [self.window(i) for i in range(step * batch_size, (step + 1) * batch_size)]
        inputs, targets = zip(*pairs, strict=True)
        return torch.stack(inputs), torch.stack(targets)

    def seen(self, count: int) -> np.ndarray:
        """The tokens that windows 0 to `count` - 1 show a model, in the order of the text: all ids after a full epoch."""
        if count >= len(self):
            return self.ids
        T = self.seq_length
        seen = np.empty((count, T + 1), self.ids.dtype)
        for row, place in zip(seen, np.sort(self._order(0)[:count])):  # one by one: indices would take four times the memory
            row[:] = self.ids[place * T : place * T + T + 1]
        return seen.ravel()

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) > 1:  # a batch can span two epochs
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self))
        return self._orders[epoch]
