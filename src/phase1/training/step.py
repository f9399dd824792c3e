"""One training step, and the loop that repeats it over a corpus."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phase1.config import TrainConfig
from phase1.device import steadier
from phase1.errors import Diverged
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE
from phase1.parallel.replicas import Alone, replicas_of
from phase1.trainable import Trainable
from phase1.training.compiler import compile_losses, require_compiler
from phase1.training.context_parallel import Context, ContextMicroBatch
from phase1.training.graphed_pieces import GraphedPieces
from phase1.training.micro_batch import GraphedMicroBatch, MicroBatch
from phase1.training.optimizers import make_optimizer
from phase1.training.pieces import Pieces, in_pieces

CHECK_EVERY = 100  # steps between checks of the loss, because each waits for the GPU
FIRST_CHECKS = (5, 20, 50)  # most that diverge do so early
Batch = tuple[Tensor, Tensor]
"""Inputs and targets, (B, T) int64 each."""


@dataclass
class TrainState:
    """A model with everything that its next step needs."""

    model: Trainable
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype  # of the autocast region; float32 is no autocast
    device: torch.device
    grad_clip: float
    config: TrainConfig
    micro_batch: MicroBatch
    replicas: Alone  # what makes the gradients of all ranks those of one step
    step: int = 0  # optimizer steps taken
    grad_norm: Tensor | None = None  # of the last step, before clipping
    begun_as: dict[str, Any] = field(default_factory=dict)  # settings of the model that its checkpoints keep


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """The autocast type that `precision` means on `device`: auto is float16 on CUDA and float32 elsewhere."""
    auto = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    dtypes = {"auto": auto, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if precision not in dtypes:
        raise ValueError(f"--precision must be one of {', '.join(dtypes)}; got {precision!r:.80}; correct it")
    return dtypes[precision]


def precision(asked: str, device: str) -> str:
    """The autocast type, and why it is that one."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[compute_dtype(asked, device)]
    if asked != "auto":
        return f"{name}, as asked"
    if device == "cpu":
        return f"{name} on the CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{name} on the GPU" + ("" if major >= 8 else f" (sm_{major}{minor} has no bf16)")


def make_train_state(
    model: Trainable,
    config: TrainConfig,
    device: torch.device | str,
    shard: bool = False,
    context: Context | None = None,
    replicas_of: Callable[[Iterable[Tensor]], Alone] = replicas_of,
) -> TrainState:
    """Move `model` to `device` and give it an optimizer, loss scaling for fp16 and, if asked, a compiled loss.

    shard: spread it over the ranks, on all of which it is equal.
    context: spread the sequences of its batches, whole ones, over the ranks.
    replicas_of: what takes the step with other ranks, from the parameters; those of this run by default.
    """
    device = torch.device(device)
    replicas: Alone | None = None
    if shard:
        from phase1.parallel.shards import spread  # takes a second to import

        replicas = spread(model, model.get_submodule("blocks").children(), ("losses", "nll"), device)
    model = model.to(device)
    dtype = compute_dtype(config.precision, device)
    if config.compile:
        require_compiler(device)
        model.prove_kernels(dtype)  # kernels cannot run their self-check inside a compiled graph
        compile_losses(model, in_pieces(model.config, config.piece_length))
    optimizer = make_optimizer(model, config, device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if config.cuda_graphs:
        require_gpu_for_graphs(device.type)
    micro_batch = make_micro_batch(model, scaler, dtype, config)
    if context is not None:
        micro_batch = ContextMicroBatch(micro_batch, context)
    replicas = replicas or replicas_of(model.parameters())
    return TrainState(model, optimizer, scaler, dtype, device, config.grad_clip, config, micro_batch, replicas)


def make_micro_batch(model: Trainable, scaler: torch.amp.GradScaler, dtype: torch.dtype, config: TrainConfig) -> MicroBatch:
    """How `config` has micro batches run: whole or in pieces, as they are or as CUDA graphs."""
    if not in_pieces(model.config, config.piece_length):
        whole = MicroBatch(model, scaler, dtype)
        return GraphedMicroBatch(whole) if config.cuda_graphs else whole
    assert config.piece_length is not None and isinstance(model, LanguageModel)
    pieces = Pieces(model, scaler, dtype, config.piece_length)
    return GraphedPieces(pieces) if config.cuda_graphs else pieces


def require_gpu_for_graphs(device_type: str) -> None:
    """Raise ValueError on the CPU, which has no CUDA graphs."""
    if device_type != "cuda":
        raise ValueError("--cuda-graphs needs a GPU; got a run on the CPU; leave it out")


def ignore(phase: str) -> None:
    """A `mark` that measures nothing."""


def train_step(state: TrainState, micro_batches: list[Batch], mark: Callable[[str], None] = ignore) -> Tensor:
    """Forward, loss, backward over the micro batches; then clip, optimizer step, gradients freed.

    The one step that training, memory and throughput share. Of several ranks each has micro batches of its own, as many tokens
    as every other, and all take the step together. `mark` is called with "start", then "forward" and
    "backward" after those of each micro batch, "communication" where there are other ranks, and "optimizer" at the end.
    The losses of micro batches weigh by their scored targets and the penalties of the rank gate by their tokens, so that the
    split does not change the step.

    Returns:
        The mean cross-entropy in nats per scored target, detached, without the penalty of the rank gate: reading it waits for
        the GPU, so read it rarely.
    """
    replicas = state.replicas
    replicas.begin()
    mark("start")
    tokens = replicas.size * sum(targets.numel() for _, targets in micro_batches)
    scored = torch.stack([(targets != IGNORE).sum() for _, targets in micro_batches])
    mean = torch.zeros((), device=state.device)
    state.model.train()
    for (inputs, targets), share in zip(micro_batches, (scored / replicas.total(scored.sum())).to(state.device), strict=True):
        part = torch.full((), targets.numel() / tokens, device=state.device)
        objective, loss = state.micro_batch.forward(inputs.to(state.device), targets.to(state.device), share, part)
        mark("forward")
        state.micro_batch.backward(objective)
        mean += loss.detach()
        del objective, loss
        mark("backward")
    mean = replicas.finish(mean)
    if replicas.size > 1:
        mark("communication")
    state.scaler.unscale_(state.optimizer)
    replicas.overflow(state.scaler, state.optimizer)
    state.grad_norm = replicas.whole(torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.grad_clip))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=not state.config.cuda_graphs)  # graphs add to the tensors they were made with
    state.step += 1
    mark("optimizer")
    return mean


def windows_per_rank(config: TrainConfig, ranks: int) -> int:
    """Windows of every step that each of `ranks` ranks trains on: the batch of a step is the same for any number of them.

    Raises ValueError where they cannot share it evenly.
    """
    B, micro = config.train_batch_size, config.micro_batch_size
    if B % ranks:
        near = max(n for n in range(1, ranks + 1) if B % n == 0)
        raise ValueError(f"--train-batch-size must be a multiple of the {ranks} ranks; got {B}; start {near}, or change it")
    if (B // ranks) % micro and micro < B // ranks:
        expected = f"--micro-batch-size must divide the {B // ranks} windows of a batch that each of {ranks} ranks has"
        raise ValueError(f"{expected}; got {micro}; give a divisor")
    return B // ranks


def stretch_per_rank(seq_length: int, ranks: int) -> int:
    """Tokens of every sequence that each of `ranks` ranks trains on, where they share sequences.

    Raises ValueError where there is one, and where they cannot share them evenly.
    """
    if ranks == 1:
        raise ValueError("--context-parallel needs several GPUs; got one process; start it by torchrun, or leave it out")
    if seq_length % ranks:
        near = max(n for n in range(1, ranks + 1) if seq_length % n == 0)
        raise ValueError(f"--seq-length must be a multiple of the {ranks} ranks; got {seq_length}; start {near}, or change it")
    return seq_length // ranks


def total_steps(config: TrainConfig, seq_length: int) -> int:
    """Optimizer steps for `train_tokens`, rounded up to whole steps."""
    return math.ceil(config.train_tokens / (config.train_batch_size * seq_length))


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up to the peak over min(warmup_steps, steps/10) steps, then a cosine to a tenth of it, or a line to 0."""
    warmup = max(1, min(config.warmup_steps, steps // 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step + 1 - warmup) / (steps + 1 - warmup)  # 0 at the last step of the warm-up, below 1 at the last of all
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def skipped_steps(state: TrainState) -> int:
    """Steps without an update because the gradients overflowed: those that AdamW has not counted."""
    counts = [values["step"] for values in state.optimizer.state.values() if "step" in values]
    return state.step - int(torch.stack(counts).max()) if counts else state.step


def train(
    state: TrainState,
    batch_at: Callable[[int], Batch],
    steps: int,
    on_step: Callable[[int, Tensor], Any] = lambda step, loss: None,
) -> float:
    """Train from `state.step` to `steps`.

    Args:
        batch_at: inputs and targets (train_batch_size, T) of a step, this rank's part of them where there are others; the
            same for every model of a comparison.
        on_step: called with the number of steps taken and the loss after each, for progress and checkpoints.
    Returns:
        Seconds spent, waiting for the device at the end.
    Raises:
        Diverged: the loss is no longer a finite number.
    """
    began = time.perf_counter()
    while state.step < steps:
        for group in state.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(state.config, state.step, steps)
        batch = batch_at(state.step)
        loss = train_step(state, list(_micro_batches(batch, state.config.micro_batch_size, state.device)))
        if state.step % CHECK_EVERY == 0 or state.step in (*FIRST_CHECKS, steps):
            check_finite(loss, state.step)
        on_step(state.step, loss)
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def check_finite(loss: Tensor, step: int) -> None:
    """Raise Diverged unless `loss` is finite."""
    if not math.isfinite(loss.item()):
        raise Diverged(f"the loss is {loss.item()} at step {step}; {steadier(loss.device)}")


def _micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[Batch]:
    inputs, targets = batch
    if device.type == "cuda":  # pinned, so that the copy does not wait for the steps before it
        inputs, targets = (part.pin_memory().to(device, non_blocking=True) for part in batch)
    yield from zip(inputs.split(size), targets.split(size), strict=True)
