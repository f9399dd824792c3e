"""The trainings of a perplexity run, one model a GPU, each a `phase1 train` of its own."""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO

from phase1.config import DataConfig, flags
from phase1.data import Corpus
from phase1.measure.perplexity.candidates import ScoredModel
from phase1.measure.perplexity.result import training_of
from phase1.runs import PerplexityRun, TrainRun
from phase1.text import one_line
from phase1.training.checkpoint import INDEX, read_index

LOOK_SECONDS = 0.2


def train_side_by_side(run: PerplexityRun, models: Sequence[ScoredModel], corpus: Corpus, gpus: Sequence[str]) -> None:
    """Train what is not trained yet of `models`, on `gpus` as CUDA_VISIBLE_DEVICES names them, one model on each at a time.

    A model of the user's own trains afterwards, when it is asked for. Who asks for the others then finds their checkpoints; one
    that failed is tried again there, and says why. When this is interrupted the trainings are too: each ends with a checkpoint
    to go on from.
    """
    ours = [model for model in models if model.checkpoint is None and model.config.model is None]
    waiting = [model for model in ours if not _finished(run, model, corpus)]
    free, running = list(gpus), dict[str, tuple[ScoredModel, subprocess.Popen[str]]]()
    try:
        while waiting or running:
            while free and waiting:
                gpu, model = free.pop(0), waiting.pop(0)
                running[gpu] = model, _start(train_command(run, model, corpus), model.key, gpu)
            for gpu, (model, process) in list(running.items()):
                if process.poll() is not None:
                    del running[gpu]
                    free.append(gpu)
                    how = "is trained" if process.returncode == 0 else f"ended with exit status {process.returncode}"
                    print(f"[{model.key}] {how}; {len(waiting)} wait, {len(running)} train", file=sys.stderr, flush=True)
            time.sleep(LOOK_SECONDS)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def train_command(run: PerplexityRun, model: ScoredModel, corpus: Corpus) -> TrainRun:
    """The training of `model` that `run` would make itself, into the folder where it looks for it."""
    folder, config = training_of(run, model, corpus)
    data = {f.name: getattr(run, f.name) for f in fields(DataConfig)}
    settings = data | asdict(model.config) | asdict(config)
    return TrainRun(**settings, seq_length=run.seq_length, out_dir=str(folder), eval_every=0)


def _finished(run: PerplexityRun, model: ScoredModel, corpus: Corpus) -> bool:
    folder, _ = training_of(run, model, corpus)
    return (folder / INDEX).exists() and bool(read_index(folder)["facts"].get("finished"))


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
        print(f"[{key}] {one_line(line.rstrip(), 500)}", file=sys.stderr, flush=True)
