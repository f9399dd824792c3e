"""The measuring commands with everything deterministic and fast in place of what they measure, for tests of their journals."""

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from phase1.cli import COMMANDS
from phase1.commands import memory, perplexity, throughput
from phase1.measure.throughput import interleaved as measure_throughput
from phase1.measure.throughput.timing import StepTime
from phase1.records import session
from phase1.records.schema import FILES
from tests.reports import MODELS, memory_result, perplexity_result

LENGTHS = (8, 16, 32)  # too few for a fit, which takes longer than all else
CASES = {
    "memory": ["baseline", "baseline_optimized", "baseline_fast", "phase1", "phase1_pieces"],
    "throughput": [f"T={length}" for length in LENGTHS],
    "perplexity": ["baseline", "phase1_htt2_ar4", "phase1_htt3_ar4", "phase1_htt4_ar4"],
}
FLAGS = {
    "memory": {},
    "throughput": {"seq_lengths": LENGTHS, "warmup_steps": 1, "measure_steps": 5},
    "perplexity": {"test_htt_ranks": (2, 3, 4), "test_ar_ssm_ranks": (4,), "ar_ssm_min_rank": 2},
}
PLOTS = {memory: ("plot_memory", "plot_memory_timeline"), throughput: ("plot_throughput",), perplexity: ("plot_perplexity", "plot_losses")}


def fake(patch, log: Path, begin=lambda case: None) -> None:
    """Replace what the three commands measure; every case that begins is a line of `log`, and then calls `begin`."""

    def started(case):
        with log.open("a") as file:
            file.write(f"{case}\n")
        begin(case)
        time.sleep(0.001)

    def memory_case(role, case):
        started(role)
        return memory_result(role, 1_000_000 * (7 + len(role)))

    def step(contender, seq_length, in_flight):
        warmup = in_flight is None
        if warmup and contender.config.mixer == "ar_ssm":
            started(f"T={seq_length}")
        if contender.config.loss == "materialized" and seq_length > 16:
            raise MemoryError("out of memory")  # a model that leaves the comparison stays out of it
        seconds = seq_length * (1 + len(contender.config.mixer)) / 7
        contender.steps += [] if warmup else [StepTime(seconds, 2 * seconds, seconds / 3 + len(contender.steps))]

    def perplexity_case(run, model, texts):
        started(model.key)
        role = "baseline" if model.key == "baseline" else "phase1"
        losses = {"window_nll_nats": [1.1 * len(model.key), 2.3, 1 / 3], "window_tokens": [3, 3, 1]}
        return [perplexity_result(role, 30.0 + len(model.key)).model_copy(update=losses)]

    corpus = SimpleNamespace(
        name="fake", source="fake", revision=None, tokenizer=SimpleNamespace(fingerprint="f" * 64, end_of_text=0),
        splits={name: SimpleNamespace(name=name, sha256=name * 4) for name in ("train", "valid")},
    )  # fmt: skip
    patch.setattr(gc, "collect", lambda: 0)  # called when a model leaves; slow in a large process
    patch.setattr(memory, "memory_result", memory_case)
    patch.setattr(
        measure_throughput, "_make", lambda contender, *rest: setattr(contender, "parameters", dict.fromkeys(PARTS, 1))
    )
    patch.setattr(measure_throughput, "_prepare", lambda contender, seq_length: None)
    patch.setattr(measure_throughput, "_step", step)
    patch.setattr(throughput, "run_warnings", lambda samples, cpu_use: [])  # of this machine, now
    patch.setattr(perplexity, "measure", perplexity_case)
    patch.setattr(perplexity, "load_corpus", lambda *args, **needs: corpus)
    for module, plots in PLOTS.items():
        for plot in plots:
            patch.setattr(module, plot, lambda report, path: path)
    patch.setattr(session, "environment", lambda: {"cpu": "fake"})
    patch.setattr(session, "machine", lambda: {"cpu": "fake"})


PARTS = ("total", "embedding", "mixer", "mlp")
assert MODELS.keys() == set(CASES["memory"])


def config(command: str, out: Path, **changes):
    """The settings of the fake run of `command`."""
    return COMMANDS[command](**(FLAGS[command] | {"out_dir": str(out)} | changes))


def run(command: str, out: Path, **changes) -> int:
    """Exit status of the fake run of `command`."""
    return {"memory": memory, "throughput": throughput, "perplexity": perplexity}[command].main(config(command, out, **changes))


def result_of(command: str, out: Path):
    """What the report holds, but for the moment it was written."""
    content = json.loads((out / FILES[command]).read_text())
    del content["created_utc"], content["run"]["out_dir"]
    return content


def journal_of(command: str, out: Path) -> Path:
    return out / FILES[command].replace(".json", ".partial.json")


def killed_child(action, die=None) -> int:
    """The wait status of a forked process that does `action()`; `die(pid)`, if given, runs here meanwhile."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        signal.alarm(60)  # a child that hangs is no hanging test
        tqdm.set_lock(threading.RLock())  # its own lock is shared with this process, and would stay locked
        try:
            action()
        except BaseException:
            os._exit(70)
        os._exit(0)
    if die:
        die(child)
    return os.waitpid(child, 0)[1]
