"""Which token comes next: a draw from the model's distribution, cut and sharpened as asked."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from phase1.config import require_sampling


@dataclass(frozen=True)
class Sampling:
    """How to change p, the model's whole distribution (its copy head included), before a draw; in this order.

    p^(1/temperature); of it the `top_k` likeliest tokens; of these the fewest likeliest that together have `top_p` of the
    probability. At temperature 0 the likeliest token. Of equally likely tokens the one with the smaller id comes first.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        require_sampling(self)

    def next_id(self, log_p: Tensor, chance: float) -> int:
        """The token that `chance`, uniform in [0, 1), draws from log p (V,)."""
        if self.temperature == 0:
            return int((log_p == log_p.max()).nonzero()[0])  # argmax of several largest may be any
        p, ids = self.distribution(log_p)
        total = p.cumsum(0)
        return int(ids[torch.searchsorted(total, chance * total[-1], right=True).clamp(max=len(ids) - 1)])

    def distribution(self, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (n,), float64, of the tokens that are left, and their ids (n,); by falling probability if cut."""
        log_p = log_p.double()
        log_p = (log_p - log_p.max()) / max(self.temperature, sys.float_info.min)  # 1 / it is finite, and the largest stays 0
        if self.top_k is None and self.top_p is None:
            return log_p.softmax(0), torch.arange(len(log_p), device=log_p.device)
        log_p, ids = log_p.sort(descending=True, stable=True)
        p = log_p[: self.top_k].softmax(0)
        if self.top_p is not None:
            p = p[: max(1, int((p.cumsum(0) - p < self.top_p).sum()))]
        return p / p.sum(), ids[: len(p)]
