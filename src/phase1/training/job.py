"""A training job: one model from text to checkpoint, resumed where an earlier run stopped."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phase1.config import ModelConfig, TrainConfig
from phase1.data import Corpus, Tokenizer, Windows
from phase1.data.tokenizer_files import TOKENIZER, folder_tokenizer
from phase1.device import device_type
from phase1.files import absent, alone_in, atomic_write, remove_empty
from phase1.parallel import group
from phase1.parallel.replicas import equal_start
from phase1.records.metrics import METRICS, PATIENCE, read_metrics, rows_of_text
from phase1.trainable import build
from phase1.training.checkpoint import INDEX, check_configs, read_index, read_whole, resume, save_checkpoint, training_facts
from phase1.training.context_parallel import Context
from phase1.training.interrupts import interrupts_wait
from phase1.training.progress import Follower, Progress
from phase1.training.proof import prove_compiled
from phase1.training.step import (
    Batch,
    TrainState,
    check_finite,
    make_train_state,
    skipped_steps,
    stretch_per_rank,
    total_steps,
    train,
    windows_per_rank,
)
from phase1.training.watch import Watch
from phase1.vocabulary.levels import VECTOR_DIM, levels
from phase1.vocabulary.statistics import (
    TokenStatistics,
    TokenVectors,
    frequency_order,
    token_counts,
    token_statistics,
    token_vectors,
)

UNWATCHED = Watch()
BEST = "best"  # folder, in that of the checkpoint, of the weights with the lowest score
SAVE_SECONDS = 300.0  # between checkpoints of an unfinished run


def train_to_checkpoint(
    model_config: ModelConfig, train_config: TrainConfig, corpus: Corpus, seq_length: int, folder: Path, *, label: str,
    watch: Watch = UNWATCHED, shard: bool = False, context_parallel: bool = False,
    begins: Callable[[], object] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Train to the end of the schedule, or go on from `folder`.

    A finished checkpoint is left as it is, and one that has reached a limit of `watch`.

    Returns:
        The checkpoint's facts: data, seconds, tokens, skipped steps, last loss, and whether it is finished: the time or the
        patience of `watch` may be over, `ended_by` says which; of these the file of the checkpoint knows patience.
    Raises:
        ValueError: `folder` holds a checkpoint of another config or of other data, or ranks cannot share a batch.

    All ranks of a run call it: each has its part of every batch, and rank 0 writes. The checkpoint goes on with any number.
    shard: each has its part of parameters, gradients and optimizer state too.
    context_parallel: its part of a batch is a stretch of every window, not some of the windows.
    begins: called once the folder is known to be this training's, before its first step.
    """
    require_one_folder(folder)
    data = {"name": corpus.name, "split": "train", "sha256": corpus.splits["train"].sha256}
    steps = total_steps(train_config, seq_length)
    begun = facts_so_far(folder, model_config, train_config, seq_length, data)
    with tokenizer_beside(folder, corpus.tokenizer), contextlib.ExitStack() as held:
        group.from_first(lambda: held.enter_context(alone_in(folder)))
        if begun and begun["finished"]:
            return begun
        if begun and (reached := group.from_first(lambda: limit_reached(folder, watch))):
            return begun | {"ended_by": reached}
        context = context_of(train_config, seq_length, context_parallel)
        windows = Windows(corpus.splits["train"].ids, seq_length, train_config.seed)
        seen = windows.seen(steps * train_config.train_batch_size)
        state = make_state(model_config, train_config, None if begun else seen, shard, context)
        order = torch.from_numpy(frequency_order(token_counts(seen, model_config.vocab_size))).int()
        del seen
        seconds = resume(folder, state)["train_seconds"] if begun else 0.0
        facts = {"data": data, "seq_length": seq_length, "tokenizer": corpus.tokenizer.fingerprint, "train_seconds": seconds}
        with interrupts_wait() as interrupted:
            try:
                batch_at = batches_of_rank(windows, train_config, context)
                if train_config.compile and not shard and context is None:  # those that share a model compile the same
                    inputs, targets = (part[: train_config.micro_batch_size] for part in batch_at(state.step))
                    prove_compiled(state, (inputs, targets))
                begins()
                kept = (folder, facts, label, watch, order, corpus.tokenizer)
                schedule = Schedule(state, batch_at, steps, seq_length, *kept, interrupted=interrupted)
                facts |= schedule.run()
            except EndsEarly as early:
                reason = str(early)
                return group.from_first(lambda: read_index(folder)["facts"] | {"ended_by": reason})
            save_checkpoint(folder, state, facts, resumable=False, token_order=order)
            group.from_first(schedule.progress.require_written)
            return group.from_first(lambda: facts)  # the others wait until it is there


def facts_so_far(
    folder: Path, model_config: ModelConfig, train_config: TrainConfig, seq_length: int, data: dict[str, str]
) -> dict[str, Any] | None:
    """The facts of the checkpoint in `folder`, None where there is none; ValueError where it is of another training."""
    if not (folder / INDEX).exists():
        return None

    def checked(index: dict[str, Any]) -> dict[str, Any]:
        facts = training_facts(folder, index)
        check_configs(folder, index, model_config, train_config)
        return facts

    facts = read_whole(folder, checked)  # first: other sizes may make other tokens of the same text
    require_same_data(folder, facts, data)
    if facts["seq_length"] != seq_length:
        theirs = f"the checkpoint in {folder} was made with --seq-length {facts['seq_length']}"
        raise ValueError(f"{theirs}; got {seq_length}; use that, or another --out-dir")
    return facts


def limit_reached(folder: Path, watch: Watch) -> str | None:
    """Which limit of `watch` the training in `folder` has reached by its checkpoint, if any: no step is left to make."""
    index = read_index(folder)
    rows = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    scored = rows_of_text([row for row in rows if row["step"] <= index["step"]], watch.unigram_loss)
    return watch.over(index["facts"]["train_seconds"], [row["val_loss"] for row in scored])


def require_same_data(folder: Path, facts: dict[str, Any], data: dict[str, str]) -> None:
    """Raise ValueError unless a checkpoint was trained on `data`."""
    if all(facts["data"][what] == data[what] for what in ("split", "sha256")):  # whatever it is called now
        return
    theirs, ours = (f"{one['name']} ({one['sha256'][:12]})" for one in (facts["data"], data))
    raise ValueError(f"the checkpoint in {folder} was trained on {theirs}; got {ours}; use that data, or another --out-dir")


def context_of(config: TrainConfig, seq_length: int, context_parallel: bool) -> Context | None:
    """Which stretch of every sequence this rank trains on; None where it trains on whole ones.

    Raises ValueError where the ranks cannot share a batch that way.
    """
    ranks = group.size()
    if context_parallel:
        return Context([stretch_per_rank(seq_length, ranks)] * ranks, group.rank())
    windows_per_rank(config, ranks)
    return None


def batches_of_rank(windows: Windows, config: TrainConfig, context: Context | None) -> Callable[[int], Batch]:
    """Inputs and targets of a step that this rank trains on: some of its windows, or its stretch of each."""
    ranks, rank = group.size(), group.rank()

    def batch_at(step: int) -> Batch:
        if context is None:
            return windows.batch(step * ranks + rank, windows_per_rank(config, ranks))
        inputs, targets = windows.batch(step, config.train_batch_size)
        return context.own(inputs), context.own(targets)

    return batch_at


def require_one_folder(folder: Path) -> None:
    """Raise ValueError unless all ranks see the same checkpoint in `folder`, or none."""
    seen = group.gathered((folder / INDEX).read_bytes() if (folder / INDEX).exists() else None)
    if any(index != seen[0] for index in seen):
        raise ValueError(f"--out-dir must be a folder that all machines of a run share; got {folder}; give one that they do")


@contextlib.contextmanager
def tokenizer_beside(folder: Path, tokenizer: Tokenizer) -> Iterator[None]:
    """`keep_tokenizer` for the block; where that leaves no checkpoint, a new file goes again, for another text may follow."""
    folders = absent(folder)
    new = group.from_first(lambda: keep_tokenizer(folder, tokenizer))  # the others would find the file that it writes
    try:
        yield
    finally:
        if new and group.rank() == 0 and not (folder / INDEX).exists():
            (folder / TOKENIZER).unlink(missing_ok=True)
            remove_empty(folders)


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Put `tokenizer` beside the checkpoint, which can then be used without the text it was trained on.

    A file that means the same stays as it is. Returns whether there was none.
    Raises ValueError for a foreign one in a folder without a checkpoint.
    """
    path = folder / TOKENIZER
    there = path.is_file()
    if there:
        with contextlib.suppress(ValueError):  # damaged
            if folder_tokenizer(folder).fingerprint == tokenizer.fingerprint:
                return False
        if not (folder / INDEX).exists():
            expected = f"{path} must be the tokenizer of the training; got another, which stays"
            raise ValueError(f"{expected}; remove it, or use another --out-dir")
    atomic_write(path, tokenizer.to_json().encode())
    return not there


def make_state(
    model_config: ModelConfig,
    train_config: TrainConfig,
    seen: np.ndarray | None,
    shard: bool = False,
    context: Context | None = None,
) -> TrainState:
    """A fresh model, ready to train; the same for equal seeds, and on all ranks. `shard` spreads it over them.

    A table that starts from statistics gets those of the tokens `seen` in training and of no others, so that no model of a
    comparison knows more text than another; None where a checkpoint brings them.
    """
    device = device_type()
    statistics = None
    if seen is not None:
        statistics = group.from_first(partial(start_of, model_config, seen, train_config.seed, device))
    torch.manual_seed(train_config.seed)
    model = build(model_config, statistics)
    equal_start(model.parameters())
    return make_train_state(model, train_config, device, shard, context)


def start_of(config: ModelConfig, seen: np.ndarray, seed: int, device: str) -> TokenStatistics | TokenVectors | None:
    """The statistics that a new model's table starts from, the same for both kinds of table; None for random rows."""
    sizes: dict[str, Any] = {"vocab_size": config.vocab_size, "dim": min(VECTOR_DIM, config.d_model)}
    if config.embedding == "htt":
        table_levels = levels(config.vocab_size, config.d_model, config.htt_rank, config.htt_dense_rows)
        return token_statistics(seen, levels=table_levels, seed=seed, device=device, **sizes)
    return token_vectors(seen, seed=seed, device=device, **sizes) if config.dense_start == "statistics" else None


class EndsEarly(Exception):
    """The time or the patience of the watch is over; the checkpoint is there to go on from."""


@dataclass
class Schedule:
    """A training on the way to its last step, watched, with a checkpoint every SAVE_SECONDS.

    batch_at: of a step, what this rank trains on. facts: of the checkpoints, without what the training adds to them.
    token_order, tokenizer: kept with the best weights. interrupted: asked after every step, whether to stop.
    """

    state: TrainState
    batch_at: Callable[[int], Batch]
    steps: int
    seq_length: int
    folder: Path
    facts: dict[str, Any]
    label: str
    watch: Watch
    token_order: Tensor
    tokenizer: Tokenizer
    interrupted: Callable[[], bool]
    saved: float = field(default_factory=time.perf_counter)
    last: Tensor = field(default_factory=lambda: torch.zeros(()))  # loss
    progress: Progress | Follower = field(init=False)

    def run(self) -> dict[str, Any]:
        """Train to the last step; what the training adds to the facts.

        Raises KeyboardInterrupt after the step in which `interrupted` becomes true, and EndsEarly after that in which the time
        or the patience of `watch` is over, with a checkpoint of it; after the last step there is none to go on from. Raises the
        OSError of a file that cannot be written after the step, with a checkpoint too: a disk that is full may be another.
        """
        kind, seconds = Progress if group.rank() == 0 else Follower, self.facts["train_seconds"]
        place = (self.steps, self.tokens_per_step, self.folder, self.watch)
        self.progress = kind(self.state, *place, seconds=seconds, label=self.label)
        try:
            train(self.state, self.batch_at, self.steps, self.after_step)
            return self.so_far()
        finally:
            self.progress.close()

    @property
    def tokens_per_step(self) -> int:
        return self.state.config.train_batch_size * self.seq_length

    def so_far(self) -> dict[str, Any]:
        """What the training has added to the facts by now."""
        done = {"trained_tokens": self.state.step * self.tokens_per_step, "finished": self.state.step == self.steps}
        times = {"train_seconds": self.progress.seconds, "skipped_steps": skipped_steps(self.state)}
        return done | times | {"loss": self.last.item()}

    def after_step(self, step: int, loss: Tensor) -> None:
        """Report the step, save where it is time, and raise what ends the training; all ranks decide the same."""
        self.last = loss
        self.progress.step(step, loss)
        reason = self.progress.end
        stop, end, failed, due, best = group.any_of(
            self.interrupted(),
            reason is not None,
            self.progress.failed is not None,
            time.perf_counter() - self.saved > SAVE_SECONDS,
            self.progress.is_best(step),
        )
        if self.watch.keep_best and best and not failed:
            now = self.facts | self.so_far()
            save_checkpoint(self.folder / BEST, self.state, now, resumable=False, token_order=self.token_order)
            group.from_first(lambda: keep_tokenizer(self.folder / BEST, self.tokenizer))
        if step < self.steps and (stop or end or failed or due):
            check_finite(loss, step)  # no checkpoint to go on from, but an end with the reason
            ended = {"ended_by": reason} if reason == PATIENCE else {}  # a run that goes on from here has no such fact
            save_checkpoint(self.folder, self.state, self.facts | self.so_far() | ended)
            if failed:
                group.from_first(self.progress.require_written)
            self.progress.keep()
            self.saved = time.perf_counter()
            if stop:
                raise KeyboardInterrupt
            if end:
                raise EndsEarly(reason or "rank 0")
