"""Peak memory of a training step without a GPU: fake tensors, followed through PyTorch's CUDA allocator, simulated."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from phase1.config import ModelConfig
from phase1.machine.cards import Chip
from phase1.measure.memory.case import MemoryCase, MemoryPeaks, timeline_record
from phase1.measure.memory.estimate.cuda_autocast import imitated_cuda
from phase1.measure.memory.estimate.simulate import simulated_timeline
from phase1.measure.memory.estimate.workspaces import ModelledCuda, workspace_bytes
from phase1.measure.memory.tracker import MemoryTracker
from phase1.measure.workload import make_workload, optimizer_tensors, random_batch
from phase1.ops.ar_ssm import imitated_card
from phase1.parallel.replicas import Alone, Imagined
from phase1.trainable import Trainable, build
from phase1.training.optimizers import MuonAdamW
from phase1.training.pieces import Pieces, in_pieces, loss_first, settled
from phase1.training.step import TrainState, train_step

CONTEXT_BYTES = 500_000_000  # assumed for CUDA context and libraries, which take 0.3 to 0.6 GB on most cards
CHIP = Chip(8, 6, 68)  # assumed without a GPU: that of the RTX 3080, for which the limits of 8 and 10 GB are
WARMUP_STEPS = 2  # optimizer state exists after the first, the allocator has its blocks after the second


def estimate_memory(case: MemoryCase, chip: Chip = CHIP) -> MemoryPeaks:
    """Peaks of a training step without a GPU and without its memory; of many pieces of a sequence, those of the first few.

    Every further piece then adds the same: its ids and the state before it.
    """
    traced = pieces_to_trace(case)
    if traced is None:
        return traced_memory(case, chip)
    first = loss_first(case.batch_size * case.seq_length, case.model.vocab_size)
    fewer, more = (traced_memory(replace(case, seq_length=length), chip, first) for length in traced)
    return extended(fewer, more, (case.seq_length - traced[1]) // (traced[1] - traced[0]))


def pieces_to_trace(case: MemoryCase) -> tuple[int, int] | None:
    """Two lengths, a piece apart, past which all pieces are alike; None where `case` is no longer."""
    N, T = case.piece_length, case.seq_length
    if N is None or not in_pieces(case.model, N):
        return None
    first = settled(case.model, T, N)
    return (first, first + N) if first + N < T else None


def extended(fewer: MemoryPeaks, more: MemoryPeaks, times: int) -> MemoryPeaks:
    """`more` with `times` times what it has more than `fewer`, which is alive all the step."""
    grown = {name: size + times * max(0, size - fewer.phase_bytes[name]) for name, size in more.phase_bytes.items()}
    added = max(grown.values()) - more.peak_allocated_bytes
    return replace(
        more,
        phase_bytes=grown,
        peak_reserved_bytes=more.peak_reserved_bytes + added,
        breakdown=more.breakdown | {"activations": more.breakdown["activations"] + added},
        timeline=None,
        assumptions=f"{more.assumptions}, pieces of a sequence alike",
    )


def traced_memory(case: MemoryCase, chip: Chip = CHIP, first: bool | None = None) -> MemoryPeaks:
    """Peaks of a training step on tensors that have sizes and no contents, so no GPU and no memory is needed.

    It imitates the GPU's run (cuda_autocast.py): FP16 autocast, FP32 gradients, loss scaling, fused AdamW or Muon with its
    state; cuBLAS workspaces and the scratch of some operators (workspaces.py); and the blocks and segments of the caching
    allocator after two warm-up steps (allocator.py), so reserved bytes too. The memory outside the allocator is assumed,
    not known.

    Args:
        chip: of the card: its compute capability decides the size of the workspaces, it and the multiprocessors that of sums
            which blocks of threads share.
        first: of pieces, whether the loss of all comes first, as it may for fewer of them and not for all; None: as in `case`.
    """
    operator_memory = ModelledCuda(chip)
    with imitated_cuda(), imitated_card(chip.major), MemoryTracker(case.model.vocab_size, "cpu", operator_memory) as tracker:
        way: dict[str, Any] = {"piece_length": case.piece_length, "optimizer": case.optimizer}

        def replicas_of(parameters: Iterable[Tensor]) -> Alone:  # without the other ranks of this run, which do not estimate
            return Imagined(parameters, case.ranks) if case.ranks > 1 else Alone()

        state = make_workload(case.model, "cpu", "fp16", make=_unmoved, replicas_of=replicas_of, **way)
        if isinstance(state.micro_batch, Pieces):
            state.micro_batch.loss_first = first
        _make_lasting_tensors(state)
        moved = tracker.label(_moved(state.model), "parameters", "")  # for their order; `watch` names them
        tracker.watch(state.model)
        batch = random_batch(case.model.vocab_size, case.batch_size, case.seq_length, "cpu")
        moved += tracker.label(state.replicas.tensors(), "gradients", "(all ranks)")
        moved += tracker.label(batch, "activations", "(batch)")
        tracker.label(optimizer_tensors(state), "optimizer_state", "(optimizer)")
        train_step(state, [batch], tracker.mark)
        parameters = state.model.parameter_counts()
    timeline, reserved = simulated_timeline(tracker.trace, moved, WARMUP_STEPS)
    assumptions = (
        f"compute capability {chip.major}.{chip.minor} ({workspace_bytes(chip) / 2**20:g} MiB of cuBLAS workspace "
        f"per thread), {operator_memory.card.multiprocessors} multiprocessors, "
        f"{CONTEXT_BYTES / 1e9:g} GB outside the allocator, "
        f"PyTorch {torch.__version__.split('+')[0]}{', not compiled' if case.compiled else ''}"
        f"{f', {case.ranks} ranks without the buffers of NCCL' if case.ranks > 1 else ''}"
    )
    return MemoryPeaks(
        basis="estimated",
        parameters=parameters,
        phase_bytes=timeline.phase_peaks,
        peak_reserved_bytes=reserved,
        outside_allocator_bytes=CONTEXT_BYTES,
        breakdown=timeline.parts_at_peak,
        top_modules=timeline.top_modules,
        timeline=timeline_record(timeline),
        assumptions=assumptions,
    )


def _make_lasting_tensors(state: TrainState) -> None:
    """Put the state where warm-up steps would leave it (optimizer state, loss scale) without running any."""
    for group in state.optimizer.param_groups:
        group.update(fused=True, foreach=False)  # as on CUDA; the CPU's default loop makes temporaries
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    if isinstance(state.optimizer, MuonAdamW):
        state.optimizer.parts[0].dtype = torch.float16  # as on CUDA
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(torch.zeros(()))


def _moved(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers in the order in which `module.to(device)` moves them."""
    for child in module.children():
        yield from _moved(child)
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _unmoved(config: ModelConfig) -> Trainable:
    """A model that stays where it is: fake parameters cannot be moved, not even to the device they are on."""
    model = build(config)
    model.to = lambda *args, **kwargs: model  # type: ignore[method-assign, assignment]
    return model
