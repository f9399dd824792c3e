"""The trainings of a perplexity run side by side on its GPUs, each a `phase1 train` of its own."""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO

from phase1.config import DataConfig, flags
from phase1.data import Corpus
from phase1.measure.perplexity.candidates import ScoredModel
from phase1.measure.perplexity.result import to_train, training_of
from phase1.runs import PerplexityRun, TrainRun
from phase1.text import one_line

LOOK_SECONDS = 0.2


def train_side_by_side(
    run: PerplexityRun, models: Sequence[ScoredModel], corpus: Corpus, gpus: Sequence[str], done: Container[str] = ()
) -> Iterator[ScoredModel]:
    """All `models`, each as soon as it is trained; those in training run on, on `gpus` as CUDA_VISIBLE_DEVICES names them.

    Each of `gpus` has one training at a time; a GPU named twice has two. Models called in `done` are not trained. One that
    failed is tried again where it is asked for, and says why there. When this is interrupted the trainings are too: each ends
    with a checkpoint to go on from.
    """
    waiting = [model for model in models if _to_train(run, model, corpus, done)]
    yield from (model for model in models if model not in waiting)
    free, running = list(gpus), dict[int, tuple[str, ScoredModel, subprocess.Popen[str]]]()
    try:
        while waiting or running:
            ended = [number for number, (_, _, process) in running.items() if process.poll() is not None]
            finished = [running.pop(number) for number in ended]
            free += [gpu for gpu, _, _ in finished]
            while free and waiting:
                gpu, model = free.pop(0), waiting.pop(0)
                process = _start(train_command(run, model, corpus), model.key, gpu)
                running[process.pid] = gpu, model, process
            for _, model, process in finished:
                how = "is trained" if process.returncode == 0 else f"ended with exit status {process.returncode}"
                print(f"[{model.key}] {how}; {len(waiting)} wait, {len(running)} train", file=sys.stderr, flush=True)
                yield model
            time.sleep(LOOK_SECONDS)
    finally:
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()


def train_command(run: PerplexityRun, model: ScoredModel, corpus: Corpus) -> TrainRun:
    """The training of `model` that `run` would make itself, into the folder where it looks for it."""
    folder, config = training_of(run, model, corpus)
    data = {f.name: getattr(run, f.name) for f in fields(DataConfig)}
    settings = data | asdict(model.config) | asdict(config)
    return TrainRun(**settings, seq_length=run.seq_length, out_dir=str(folder), eval_every=0)


def _to_train(run: PerplexityRun, model: ScoredModel, corpus: Corpus, done: Container[str]) -> bool:
    return model.key not in done and to_train(run, model, corpus)


def _start(command: TrainRun, key: str, gpu: str) -> "subprocess.Popen[str]":
    """The process of a training that sees one GPU; its lines are shown with the name of its model in front."""
    Path(command.out_dir).mkdir(parents=True, exist_ok=True)
    print(f"[{key}] trains on GPU {gpu}, in {one_line(command.out_dir)}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "phase1", "train", *shlex.split(flags(command))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
    )
    assert process.stderr is not None
    threading.Thread(target=_show, args=(process.stderr, key), daemon=True).start()
    return process


def _show(lines: IO[str], key: str) -> None:
    for line in lines:
        own = line.rstrip().removeprefix(f"{key}: ")  # named once
        print(f"[{key}] {one_line(own, 500)}", file=sys.stderr, flush=True)
