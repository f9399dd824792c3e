"""Training in pieces on a GPU: long sequences, speed, and memory, every case in a process of its own.

    python benchmarks/pieces.py [CASE ...] [--limit 7.2GB] [--timeout 150] [--out-dir results/benchmarks]

Without a CASE all run; `--list` names them. A capped case may take `--limit` of the card, what is outside PyTorch's allocator
included (phase1.measure.memory.limit.cap_memory). Writes pieces.json into --out-dir after every case, and keeps in it what
cases of earlier runs have found. Needs a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phase1.config import EngineShape, ModelConfig, TrainConfig
from phase1.files import atomic_write
from phase1.machine.environment import environment
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.largest import probe_size
from phase1.measure.memory.limit import cap_memory, outside_bytes, parse_bytes
from phase1.measure.memory.measured import measure_memory
from phase1.measure.memory.search import edge, largest_size
from phase1.measure.workload import random_batch
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.training.step import make_train_state, train_step

LARGE = EngineShape(d_model=768, n_layers=12, n_heads=12)  # the class of 124M parameters with a dense table
WARMUP, MEASURED = 2, 3  # steps of a speed
SHORT = 4  # pieces of the step that warms up a long sequence: all kinds that it has
FILE = "pieces.json"


@dataclass(frozen=True)
class Training:
    """Steps of a model, B sequences of T tokens, `micro` at a time, as they come."""

    B: int
    T: int
    piece_length: int | None = None
    micro: int | None = None
    capped: bool = True
    compile: bool = False
    graphs: bool = True
    shape: EngineShape = field(default_factory=EngineShape)
    overrides: dict[str, Any] = field(default_factory=dict)

    def model(self) -> ModelConfig:
        return model_config("phase1", self.shape, **{"recompute": "none", **self.overrides})

    @property
    def what(self) -> str:
        """In words."""
        model, parts = self.model(), [f"{self.B} x {self.T:,} tokens"]
        parts += [f"width {model.d_model}, {model.n_layers} layers"] * (self.shape != EngineShape())
        parts += [f"in pieces of {self.piece_length:,}"] if self.piece_length else []
        parts += [f"{self.micro} sequences at a time"] if self.micro else []
        parts += ["compiled"] * self.compile + ["blocks recomputed"] * (model.recompute == "block")
        return ", ".join(parts + ["two-level output"] * (model.htt_output == "two_level"))


def speed(case: Training, limit: int) -> dict[str, Any]:
    """Tokens per second, peak bytes and loss; long sequences are warmed up by shorter ones, which capture the same graphs."""
    model = case.model()
    if case.capped:
        cap_memory(model, limit)
    torch.manual_seed(0)
    config = TrainConfig(compile=case.compile, cuda_graphs=case.graphs, piece_length=case.piece_length)
    state = make_train_state(LanguageModel(model), config, "cuda")
    ids, targets = random_batch(model.vocab_size, case.B, case.T, "cuda")
    size = case.micro or case.B
    batch = list(zip(ids.split(size), targets.split(size), strict=True))
    few = case.T if case.piece_length is None else min(case.T, SHORT * case.piece_length)
    short = [(a[:, :few], b[:, :few]) for a, b in batch]
    for _ in range(WARMUP):
        train_step(state, short)
    torch.cuda.synchronize()
    seconds, loss = [], float("nan")
    for _ in range(1 if case.T > 2**22 else MEASURED):
        began = time.perf_counter()
        loss = train_step(state, batch).item()
        seconds.append(time.perf_counter() - began)
    return {
        "d_model": model.d_model,
        "B": case.B,
        "T": case.T,
        "capped": case.capped,
        "seconds": seconds,
        "tokens_per_s": case.B * case.T / sorted(seconds)[len(seconds) // 2],
        "loss": loss,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "needed_bytes": torch.cuda.max_memory_reserved() + outside_bytes(),
    }


def peak(role: str, piece_length: int | None, overrides: dict[str, Any], limit: int) -> dict[str, Any]:
    """Of the documented memory command, B 4 x T 2,048."""
    found = measure_memory(MemoryCase(model_config(role, EngineShape(), **overrides), 4, 2048, piece_length=piece_length))
    return {"peak_allocated_bytes": found.peak_allocated_bytes, "needed_bytes": found.needed_bytes}


def sequences(role: str, piece_length: int | None, start: int, overrides: dict[str, Any], limit: int) -> dict[str, Any]:
    """The most sequences of 2,048 tokens that train under the limit: at most PROBES, each a process."""
    began, budget = time.monotonic(), 110.0
    case = MemoryCase(model_config(role, EngineShape(), **overrides), 1, 2048, limit, piece_length=piece_length)
    late = lambda: time.monotonic() - began > budget  # noqa: E731
    probes = largest_size(lambda B: probe_size(replace(case, batch_size=B)), start, 512, limit, out_of_time=late)
    fits, refused = edge(probes, 512)
    return {"sequences": fits, "refused": refused, "probes": {B: asdict(probe) for B, probe in probes.items()}}


Case = Callable[[int], dict[str, Any]]
TWO_LEVEL = {"htt_output": "two_level"}
CASES: dict[str, Case] = {
    "whole_64x512": partial(speed, Training(64, 512, capped=False)),
    "1M": partial(speed, Training(1, 2**20, 16384)),
    "1M_32k": partial(speed, Training(1, 2**20, 32768, capped=False)),
    "1M_64k": partial(speed, Training(1, 2**20, 65536, capped=False)),
    "1M_4k": partial(speed, Training(1, 2**20, 4096)),
    "1M_two_level": partial(speed, Training(1, 2**20, 16384, overrides=TWO_LEVEL)),
    "16M": partial(speed, Training(1, 2**24, 16384, overrides={"recompute": "block"})),
    "whole_64x512_compiled": partial(speed, Training(64, 512, capped=False, compile=True)),
    "1M_compiled": partial(speed, Training(1, 2**20, 16384, compile=True)),
    "large_uncapped": partial(speed, Training(64, 512, capped=False, compile=True, shape=LARGE)),
    "large_micro": partial(speed, Training(64, 512, micro=16, compile=True, shape=LARGE)),
    "large_micro_8": partial(speed, Training(64, 512, micro=8, compile=True, shape=LARGE)),
    "large_selective": partial(
        speed, Training(64, 512, micro=32, compile=True, shape=LARGE, overrides={"recompute": "selective"})
    ),
    "large_pieces": partial(speed, Training(1, 32768, 4096, shape=LARGE)),
    "peak_baseline": partial(peak, "baseline", None, {}),
    "peak_baseline_optimized": partial(peak, "baseline_optimized", None, {}),
    "peak_engine": partial(peak, "phase1", None, {}),
    "peak_pieces_256": partial(peak, "phase1", 256, {}),
    "peak_pieces_512": partial(peak, "phase1", 512, {}),
    "peak_two_level_256": partial(peak, "phase1", 256, TWO_LEVEL),
    "sequences_baseline_optimized": partial(sequences, "baseline_optimized", None, 51, {}),
    "sequences_pieces_256": partial(sequences, "phase1", 256, 160, {}),
}
RATIOS = {
    "1M over 64 x 512": ("tokens_per_s", "1M", "whole_64x512"),
    "1M over 64 x 512, pieces of 4k": ("tokens_per_s", "1M_4k", "whole_64x512"),
    "1M over 64 x 512, pieces of 32k, without a limit": ("tokens_per_s", "1M_32k", "whole_64x512"),
    "1M over 64 x 512, pieces of 64k, without a limit": ("tokens_per_s", "1M_64k", "whole_64x512"),
    "1M over 64 x 512, compiled": ("tokens_per_s", "1M_compiled", "whole_64x512_compiled"),
    "D 768, L 12: capped over uncapped": ("tokens_per_s", "large_micro_8", "large_uncapped"),
    "D 768, L 12: 1 x 32k in pieces over uncapped": ("tokens_per_s", "large_pieces", "large_uncapped"),
    "peak, pieces of 256 over baseline_optimized": ("peak_allocated_bytes", "peak_pieces_256", "peak_baseline_optimized"),
    "peak, two levels over baseline_optimized": ("peak_allocated_bytes", "peak_two_level_256", "peak_baseline_optimized"),
    "sequences over baseline_optimized": ("sequences", "sequences_pieces_256", "sequences_baseline_optimized"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="of --list; all by default")
    parser.add_argument("--limit", default="7.2GB", help="of the card, for capped cases")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for a case")
    parser.add_argument("--out-dir", default="results/benchmarks")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print(*CASES, sep="\n")
        return
    if options.one:
        print(json.dumps(CASES[options.one](parse_bytes(options.limit))))
        return
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"CASE must be one of {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    file = Path(options.out_dir) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text())["cases"] if file.exists() else {}
    record = {"environment": environment(), "command": "python benchmarks/pieces.py [CASE ...]", "cases": found}
    for name in options.cases or CASES:
        found[name] = {"what": what(name)} | in_a_process(name, options.limit, options.timeout)
        atomic_write(file, json.dumps(record, indent=1).encode())
        print(f"{name:28} {line(found[name])}", flush=True)
    for label, (key, ours, theirs) in RATIOS.items():
        if found.get(ours, {}).get(key) and found.get(theirs, {}).get(key):
            print(f"{label:48} {found[ours][key] / found[theirs][key]:.3f}")


def what(name: str) -> str:
    """A case in words."""
    kind, arguments = CASES[name].func, CASES[name].args  # type: ignore[attr-defined]
    if kind is speed:
        return str(arguments[0].what)
    role = "engine" if arguments[0] == "phase1" else arguments[0]
    pieces = f", in pieces of {arguments[1]}" if arguments[1] else ""
    measured = "peak of 4 x 2,048 tokens" if kind is peak else "sequences of 2,048 tokens that train under the limit"
    return f"{role}{pieces}: {measured}"


def in_a_process(name: str, limit: str, timeout: float) -> dict[str, Any]:
    """What the case gives, with the conditions; of one that fails, the last line of its error."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--one", name, "--limit", limit]
    conditions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "limit": limit}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return conditions | {"failed": f"no result within {timeout:g} s"}
    spent = {"process_seconds": time.perf_counter() - began}
    if done.returncode:
        return conditions | spent | {"failed": (done.stderr.strip() or "no message").splitlines()[-1].split(". ")[0]}
    return conditions | spent | json.loads(done.stdout.splitlines()[-1])


def line(result: dict[str, Any]) -> str:
    words = [f"FAILED: {result['failed']}"] if "failed" in result else []
    if "tokens_per_s" in result:
        words.append(f"{result['tokens_per_s'] / 1e3:.0f}k tokens/s, loss {result['loss']:.3f}")
    if "peak_allocated_bytes" in result:
        words.append(f"peak {result['peak_allocated_bytes'] / 1e9:.3f} GB, needs {result['needed_bytes'] / 1e9:.2f} GB")
    if "sequences" in result:
        words.append(f"{result['sequences']} sequences train, {result['refused']} do not, {len(result['probes'])} probes")
    return "; ".join([*words, f"{result.get('process_seconds', 0):.0f} s"])


if __name__ == "__main__":
    main()
