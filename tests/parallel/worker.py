"""What 2 ranks do, then 4, that a test starts: worker.py FOLDER; rank 0 of N writes N.json there.

All are forks of one process, since they would spend most of their time on imports. Commands started by torchrun are in
test_torchrun.py.
"""

import hashlib
import importlib
import json
import os
import signal
import socket
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.multiprocessing import start_processes

from phase1 import world
from phase1.config import EngineShape, TrainConfig
from phase1.data import Corpus, Windows
from phase1.machine.isolate import run_isolated
from phase1.measure.perplexity.evaluate import Protocol, evaluate
from phase1.measure.throughput.ranks import attempt, slowest
from phase1.measure.throughput.timing import StepTime
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE
from phase1.parallel import group
from phase1.parallel.run import processes
from phase1.roster import model_config
from phase1.training.job import batches_of_rank, context_of, train_to_checkpoint
from phase1.training.step import make_train_state, train, train_step
from phase1.training.watch import Watch

TINY = EngineShape(
    vocab_size=50, d_model=16, n_layers=1, n_heads=2, ar_ssm_max_rank=4, ar_ssm_min_rank=2, ar_ssm_window=4,
    htt_rank=1, htt_dense_rows=2, htt_groups=6,
)  # fmt: skip
T, B, STEPS, FEW, JOB_STEPS, PAUSE = 8, 8, 20, 6, 6, 3
IDS = np.random.default_rng(0).zipf(1.3, 3000).astype(np.int64).clip(max=49).astype(np.uint16)
CONFIG = TrainConfig(
    train_tokens=STEPS * B * T, train_batch_size=B, micro_batch_size=2, warmup_steps=3, learning_rate=3e-3, optimizer="adamw"
)
JOB = replace(CONFIG, train_tokens=JOB_STEPS * B * T)
PROTOCOL = Protocol("", "", "valid", T, 5, 0, 37)


def fresh(role="phase1", config=CONFIG, shard=False, context=None, dtype=torch.float32):
    """Only sharded blocks are recomputed: that costs half of the time, and only what a shard gathers for it could go wrong."""
    torch.manual_seed(0)
    config_of_model = replace(model_config(role, TINY), recompute="block" if shard else "none")
    return make_train_state(LanguageModel(config_of_model).to(dtype), config, "cpu", shard, context)


LOSSES = [(role, micro) for role in ("phase1", "baseline") for micro in (1, 2)]


@cache
def losses(role="phase1", micro_batch_size=2, **how):
    """Loss and norm of the gradient of steps of the same batches, whoever takes them.

    In float64: a step moves what has next to no gradient by its sign, which in float32 is that of rounding.
    """
    return trained(role, micro_batch_size, torch.float64, **how)[1]


def bits():
    """Of all parameters after such steps in float32."""
    state, _ = trained("phase1", 2, torch.float32)
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in state.model.parameters())).hexdigest()


def trained(role, micro_batch_size, dtype, steps=FEW, shard=False, context_parallel=False, optimizer="adamw"):
    context, found = context_of(CONFIG, T, context_parallel), []
    state = fresh(role, replace(CONFIG, micro_batch_size=micro_batch_size, optimizer=optimizer), shard, context, dtype)
    batch_at = batches_of_rank(Windows(IDS, T, 0), CONFIG, context)
    train(state, batch_at, steps, lambda step, loss: found.append((loss.item(), state.grad_norm.item())))
    return state, found


def uneven_gradients():
    """Sum of squares of the gradients of a step whose windows have different numbers of scored targets."""
    state, (inputs, targets) = fresh(), Windows(IDS, T, 0).batch(0, B)
    targets = targets.clone()
    for row in range(B):
        targets[row, : row % T] = IGNORE
    mine = slice(group.rank() * B // group.size(), (group.rank() + 1) * B // group.size())
    sums = []

    def mark(name):
        if name == ("backward" if group.size() == 1 else "communication"):
            sums.append([float(p.grad.double().square().sum()) for p in state.model.parameters()])

    loss = train_step(state, list(zip(inputs[mine].split(1), targets[mine].split(1))), mark)
    return [loss.item(), *sums[-1]]


def overflow(shard=False, context_parallel=False):
    """An infinity in the gradients of the last rank: scales of all ranks after it, and whether a parameter has moved."""
    config = replace(CONFIG, train_batch_size=2 * group.size())
    context = context_of(config, T, context_parallel)
    state = fresh(shard=shard, context=context)
    state.scaler = state.micro_batch.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = whole_parameters(state)
    batch = [batches_of_rank(Windows(IDS, T, 0), config, context)(0)]
    train_step(state, batch, partial(spoil, state))
    stayed = all(torch.equal(a, b) for a, b in zip(before, whole_parameters(state)))
    train_step(state, batch)
    moved = not all(torch.equal(a, b) for a, b in zip(before, whole_parameters(state)))
    return group.gathered([state.scaler.get_scale(), stayed, moved])


def spoil(state, name):
    if name == "backward" and group.rank() == group.size() - 1:
        gradient = next(iter(state.model.blocks.parameters())).grad
        getattr(gradient, "_local_tensor", gradient).view(-1)[0] = torch.inf


def whole_parameters(state):
    return [p.full_tensor().clone() if hasattr(p, "full_tensor") else p.detach().clone() for p in state.model.parameters()]


def scores(shard=False):
    """Bits of what `evaluate` finds, here and in a training, in 10 batches and in one."""
    model, every = fresh(shard=shard).model, []
    for windows in (PROTOCOL.max_windows, 1):
        found = evaluate(model, IDS, replace(PROTOCOL, max_windows=windows), batch_size=4, dtype=torch.float32)
        bits = hashlib.sha256(found.losses.tobytes() + found.places.tobytes() + found.tokens.tobytes()).hexdigest()
        every.append([bits, found.effective_rank])
    return group.gathered(every)


class Stop:
    """A tracker that interrupts a training as Ctrl-C does."""

    def __init__(self, step):
        self.at = step

    def log(self, row):
        if row["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def sample(self, step, text): ...

    def close(self): ...


class FakeTokenizer:
    fingerprint = "none"

    def to_json(self):
        assert world.is_first(), "another rank keeps the tokenizer too, and may find the file of rank 0"
        return "{}"


def job(folder, stop=None, **how):
    """`train_to_checkpoint` to the end, or interrupted after a step."""
    from phase1.data.corpora import Split

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has what is in its background ignore
    corpus = Corpus("text", "", None, {"train": Split("train", IDS, "sha")}, FakeTokenizer())
    watch = Watch(trackers=[Stop(stop)] if stop and world.is_first() else ())
    try:
        train_to_checkpoint(model_config("phase1", TINY), JOB, corpus, T, Path(folder), label="x", watch=watch, **how)
    except KeyboardInterrupt:
        return "paused"
    return "finished"


def failures():
    """What every rank hears of a call that fails on one, before or after the gate, and of the next one, which does not."""

    def call(where, error):
        if where == "before" and group.rank() == group.size() - 1:
            raise error
        group.gate()
        if where == "after" and group.rank() == 0:
            raise error

    heard = [
        attempt(call, where, error).status
        for where, error in (("before", MemoryError()), ("none", None), ("after", MemoryError("out of memory")), ("none", None))
    ]
    return group.gathered(heard)


def child(name, fails):
    """In a process that a rank starts: a sum over those of all ranks, or no memory on the last."""
    with processes("child", name):
        if fails and group.rank() == group.size() - 1:
            raise MemoryError
        return int(group.sum_(torch.tensor(1 + group.rank())))


def children():
    return [
        [(outcome.status, outcome.value) for outcome in group.gathered(run_isolated(child, f"child {fails}", fails))]
        for fails in (False, True)
    ]


def times():
    return [step.total_ms for step in slowest([StepTime(1.0 + group.rank(), 1, 1), StepTime(5.0 - group.rank(), 1, 1)])]


def opened_for_writing(found, event, arguments):
    """Note the files, but those that Python itself compiles at the first import of a module."""
    path, _, how = arguments if event == "open" else (None, None, None)
    writes = isinstance(path, str) and how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and not path.startswith("/dev/") and "__pycache__" not in path:
        found.append(path)


def rank_main(rank, ranks, port, folder):
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    written = []
    with world.first_speaks(), processes("worker"):
        if not world.is_first():
            sys.addaudithook(partial(opened_for_writing, written))
        n = group.size()
        found = {
            "losses": {f"{role} {micro}": losses(role, micro, steps=STEPS) for role, micro in LOSSES},
            "uneven": uneven_gradients(),
            "overflow": overflow(),
            "context overflow": overflow(context_parallel=True),
            "context losses": losses(context_parallel=True),
            "muon losses": [losses(optimizer="muon")],
            "scores": scores(),
            "failures": failures(),
            "times": times(),
            "first": group.from_first(lambda: world.rank()),
        }
        if n == 2:
            found["equal runs"] = [bits() for _ in range(2)]
            found["children"] = children()
            found["sharded losses"] = losses(shard=True)
            found["sharded scores"] = scores(shard=True)
            found["muon losses"].append(losses(optimizer="muon", shard=True))
            found["sharded overflow"] = overflow(shard=True)
            found["jobs"] = {
                "from one": job(folder / "from one"),
                "to one": job(folder / "to one", stop=PAUSE),
                "from one, to one": job(folder / "from one, to one", stop=PAUSE + 1),
                "to four": job(folder / "to four", stop=PAUSE),
                "sharded, to one": job(folder / "sharded, to one", stop=PAUSE, shard=True),
                "from one, sharded": job(folder / "from one, sharded", shard=True),
                "context, to one": job(folder / "context, to one", stop=PAUSE, context_parallel=True),
                "context, to four": job(folder / "context, to four", stop=PAUSE, context_parallel=True),
                "from one, context": job(folder / "from one, context", context_parallel=True),
            }
        else:
            found["jobs"] = {"to four": job(folder / "to four")}
            found["jobs"]["context, to four"] = job(folder / "context, to four", context_parallel=True)
        found["written by others"] = [path for paths in group.gathered(written)[1:] for path in paths]
        if world.is_first():
            (folder / f"{n}.json").write_text(json.dumps(found))


def main(folder):
    for name in ("torch._dynamo", "torch.distributed.fsdp"):  # what a rank would import on its way
        importlib.import_module(name)
    torch.set_num_threads(1)
    for ranks in (2, 4):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        start_processes(rank_main, (ranks, port, folder), ranks, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
