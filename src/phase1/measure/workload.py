"""The workload of memory and throughput: a model ready to train, and random tokens to train it on."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from phase1.config import ModelConfig, Optimizer, TrainConfig
from phase1.parallel.replicas import Alone, replicas_of
from phase1.trainable import Trainable, build
from phase1.training.step import TrainState, make_train_state

Precision = Literal["auto", "fp16", "bf16", "fp32"]
SEED = 0


def make_workload(
    model: ModelConfig,
    device: str,
    precision: Precision = "auto",
    compile: bool = False,
    cuda_graphs: bool = False,
    make: Callable[[ModelConfig], Trainable] = build,
    piece_length: int | None = None,
    optimizer: Optimizer = TrainConfig.optimizer,
    replicas_of: Callable[[Iterable[Tensor]], Alone] = replicas_of,
) -> TrainState:
    """The training state of a new model, made as `phase1 train` makes it."""
    torch.manual_seed(SEED)
    way: dict[str, Any] = {"compile": compile, "cuda_graphs": cuda_graphs, "piece_length": piece_length}
    config = TrainConfig(precision=precision, optimizer=optimizer, **way)
    return make_train_state(make(model), config, device, replicas_of=replicas_of)


def scores_bytes(config: ModelConfig, batch_size: int, seq_length: int) -> int:
    """Approximate bytes of the scores of attention that is not fused: six float32 tensors (B, H, T, T) at the peak."""
    return 6 * 4 * batch_size * config.n_heads * seq_length**2


def random_batch(vocab_size: int, batch_size: int, seq_length: int, device: str) -> tuple[Tensor, Tensor]:
    """Uniform token ids and their targets, (B, T) int64 each, the same for every model: costs do not depend on the text."""
    ids = torch.randint(vocab_size, (batch_size, seq_length + 1), generator=torch.Generator().manual_seed(SEED))
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def optimizer_tensors(state: TrainState) -> Iterator[Tensor]:
    """Every tensor the optimizer keeps between steps."""
    for values in state.optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


def lasting_tensors(state: TrainState) -> Iterator[Tensor]:
    """Every tensor that is there between steps."""
    yield from (*state.model.parameters(), *state.model.buffers(), *optimizer_tensors(state), *state.replicas.tensors())


def control_batch_size(config: ModelConfig, batch_size: int, longest: int, memory_bytes: int | None) -> int:
    """`batch_size`, halved until the scores of the longest length take at most half of the device's memory; 1 at least."""
    while batch_size > 1 and memory_bytes is not None and 2 * scores_bytes(config, batch_size, longest) > memory_bytes:
        batch_size //= 2
    return batch_size
