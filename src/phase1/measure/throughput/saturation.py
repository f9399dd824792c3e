"""Find the batch that keeps the device busy, and whether CUDA graphs can be captured, before anything is measured."""

import gc
import time
from collections.abc import Callable, Mapping

import torch

from phase1.config import ModelConfig
from phase1.machine.isolate import run_here
from phase1.measure.workload import make_workload, random_batch
from phase1.training.step import TrainState, train_step

GROWTH = 1.7  # least factor of time for twice the batch: 2 on a busy device, 1 on one that waits
MOST = 64  # largest multiple of the batch that was asked for
SHARE = 0.8  # share of the free memory that all models together may take
STEPS = 5  # timed steps of one batch


def busy_batch(asked: int, seconds: Callable[[int], float], fits: Callable[[int], bool]) -> tuple[int, str]:
    """The smallest `asked` * 2^k whose double takes GROWTH times as long, or the last that `fits`; and why, if not `asked`.

    seconds: of a step with that many sequences. fits: whether every model trains with so many.
    """
    batch, spent, first = asked, seconds(asked), ""
    while True:
        doubled = seconds(2 * batch)
        growth = doubled / spent
        if growth >= GROWTH:
            return batch, first
        first = first or f"twice the {asked} sequences take {growth:.2f} x the time: the device waits"
        if 2 * batch > MOST * asked or not fits(2 * batch):
            limit = "memory" if 2 * batch <= MOST * asked else f"{MOST} x --batch-size"
            return batch, f"{first}; {limit} allows no more than {batch}, give longer --seq-lengths"
        batch, spent = 2 * batch, doubled


def saturating_batch(
    engine: ModelConfig,
    models: Mapping[str, ModelConfig],
    asked: int,
    shortest: int,
    longest: int,
    cuda_graphs: bool,
    piece_length: int | None = None,
) -> tuple[int, str]:
    """`busy_batch` of `engine` at the shortest length, on the first GPU; all `models` must train it at the longest.

    Call it in a fresh process: it leaves its memory behind.
    """
    state = make_workload(engine, "cuda", cuda_graphs=cuda_graphs, piece_length=piece_length)
    free = torch.cuda.mem_get_info()[0]

    def fits(batch: int) -> bool:
        peaks = [run_here(_peak_bytes, config, batch, longest, piece_length).value for config in models.values()]
        return all(peak is not None for peak in peaks) and sum(peak or 0 for peak in peaks) <= SHARE * free

    return busy_batch(asked, lambda batch: _seconds(state, engine.vocab_size, batch, shortest), fits)


def graphs_fail(models: Mapping[str, ModelConfig], seq_length: int, piece_length: int | None = None) -> str:
    """Why a step of one of `models` cannot be captured as CUDA graphs, empty if all can. In a fresh process."""
    for role, config in models.items():
        outcome = run_here(_captured_step, config, seq_length, piece_length)
        if outcome.status == "error":
            return f"{role}: {outcome.message}"
    return ""


def _captured_step(config: ModelConfig, seq_length: int, piece_length: int | None) -> None:
    state = make_workload(config, "cuda", cuda_graphs=True, piece_length=piece_length)
    train_step(state, [random_batch(config.vocab_size, 1, seq_length, "cuda")])
    torch.cuda.synchronize()


def _seconds(state: TrainState, vocab_size: int, batch: int, seq_length: int) -> float:
    """The least time of STEPS steps, after two to warm up."""
    data, times = random_batch(vocab_size, batch, seq_length, "cuda"), []
    for number in range(-2, STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        train_step(state, [data])
        torch.cuda.synchronize()
        times += [time.perf_counter() - began] if number >= 0 else []
    return min(times)


def _peak_bytes(config: ModelConfig, batch: int, seq_length: int, piece_length: int | None) -> int:
    """Bytes that the allocator takes for two steps of a model, which is made and dropped here."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    state = make_workload(config, "cuda", piece_length=piece_length)
    for _ in range(2):
        train_step(state, [random_batch(config.vocab_size, batch, seq_length, "cuda")])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
