"""Rank gates that have closed: layers whose mixers use no rank but those that cannot be switched off."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from phase1.trainable import Trainable

CLOSED = 0.5  # ranks that a gate leaves open on average, at most


@contextmanager
def closed_gates(model: Trainable) -> Iterator[list[int]]:
    """After the block, the layers, from 1, whose gates were closed for what the model computed within it."""
    config, closed = model.config, list[int]()
    gated = config.mixer == "ar_ssm" and config.ar_ssm_min_rank < config.ar_ssm_max_rank
    mixers = [block.mixer for block in getattr(model, "blocks", ())] if gated else []
    ranks: list[list[Tensor]] = [[] for _ in mixers]
    with ExitStack() as hooks:
        for mixer, seen in zip(mixers, ranks):

            def keep(module: Any, inputs: Any, outputs: Any, seen: list[Tensor] = seen) -> None:
                seen += [] if outputs[2] is None else [outputs[2].detach()]

            handle = mixer.register_forward_hook(keep)
            hooks.callback(handle.remove)
        yield closed
    for layer, seen in enumerate(ranks, 1):
        if seen and torch.stack(seen).mean() < config.ar_ssm_min_rank + CLOSED:
            closed.append(layer)
