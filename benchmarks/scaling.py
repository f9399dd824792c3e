"""Training on several GPUs of one machine against one: speed, losses, and a run that goes on with another number of them.

    python benchmarks/scaling.py [--gpus 2] [--parts steps resume] [--smoke]

steps: weak scaling, a step of --batch-size x --seq-length tokens a GPU, compiled, as CUDA graphs, all GPUs together and rank 0
alone in the same rounds; and the losses of 20 steps on one batch order, by all and, twice, by one: their difference against
that of one GPU to itself. resume: `phase1 train` on 1, on all, on 1 GPU again, against runs on one without a pause.
Prints a table and writes scaling.json into --out-dir; a part that is not run stays as it was. --smoke: tiny, on a CPU too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phase1.files import atomic_write

STEPS, WARMUP, ROUNDS = 20, 5, 30
SECONDS = 150.0  # for any one process
TINY = {"vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 2, "ar_ssm_window": 4, "htt_dense_rows": 4}
TINY |= {"htt_groups": 10, "ar_ssm_max_rank": 4, "ar_ssm_min_rank": 2, "htt_rank": 2}
TRAIN = "--seq-length 256 --train-batch-size 64 --micro-batch-size 32 --eval-every 0 --recompute none --cuda-graphs"
SMOKE = (
    "--d-model 16 --n-layers 1 --n-heads 2 --htt-dense-rows 16 --htt-groups 16 "
    "--ar-ssm-max-rank 4 --htt-rank 2 --seq-length 32 --train-batch-size 8 --micro-batch-size 2 --eval-every 0"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=("steps", "resume"), default=["steps", "resume"])
    parser.add_argument("--batch-size", type=int, default=64, help="sequences of a step and GPU")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--dataset-name", default="builtin", help="what resume trains on")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out-dir", default="results/benchmarks")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return measure_steps(options)
    folder = Path(options.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scaling.json"
    kept = json.loads(file.read_text()) if file.exists() else {}  # the other part, of an earlier run
    record: dict[str, Any] = (kept if kept.get("gpus") == options.gpus else {}) | {"gpus": options.gpus}
    if "steps" in options.parts:
        began = time.perf_counter()
        run(torchrun(options.gpus) + [__file__, *sys.argv[1:]])
        record |= json.loads((folder / "scaling_steps.json").read_text())
        (folder / "scaling_steps.json").unlink()
        record["steps_seconds"] = time.perf_counter() - began
        atomic_write(file, json.dumps(record, indent=1).encode())
        print_steps(record)
    if "resume" in options.parts:
        record["resume"] = measure_resume(options, folder)
        print_resume(record["resume"])
    atomic_write(file, json.dumps(record, indent=1).encode())
    print(f"written: {file}")
    return 0


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def run(command: list[str], **environment: str) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | environment, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"scaling: {' '.join(command)} ended with {done.returncode}")
    return done.stdout


def measure_steps(options: argparse.Namespace) -> int:
    """On every rank: weak scaling and losses, into scaling_steps.json."""
    from phase1.parallel import group
    from phase1.parallel.run import processes, see_one_gpu

    see_one_gpu()
    with processes("scaling"):
        bench = Bench(options)
        together, alone = bench.rounds(4 if options.smoke else ROUNDS)
        peaks = group.gathered(torch.cuda.max_memory_allocated() if bench.fast else 0)
        first = [bench.losses(bench.alone, lambda batches: sum(batches, [])) for _ in range(2)] if group.rank() == 0 else None
        group.gate()
        shared = bench.losses(bench.state, lambda batches: batches[group.rank()])
        same = group.gathered(shared)
        if first is not None:
            record = bench.facts() | speeds(together, alone, bench.tokens) | {
                "peak_by_rank_bytes": peaks, "losses_one_gpu": first, "losses_together": shared,
                "losses_equal_on_all_ranks": all(other == same[0] for other in same),
                "difference_one_to_itself": worst(*first), "difference_together_to_one": worst(shared, first[0]),
            }  # fmt: skip
            (Path(options.out_dir) / "scaling_steps.json").write_text(json.dumps(record))
    return 0


class Bench:
    """One training state for all measurements of a rank, so that it compiles once."""

    def __init__(self, options: argparse.Namespace) -> None:
        from phase1.config import EngineShape, TrainConfig
        from phase1.model import LanguageModel
        from phase1.parallel import group
        from phase1.parallel.replicas import Alone
        from phase1.roster import model_config
        from phase1.training.proof import prove_compiled
        from phase1.training.step import make_train_state

        self.ranks, self.rank = group.size(), group.rank()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.fast = self.device == "cuda"
        self.size = (2, 32) if options.smoke else (options.batch_size, options.seq_length)
        self.tokens = self.size[0] * self.size[1]
        shape = model_config("phase1", EngineShape(), recompute="none", **(TINY if options.smoke else {}))
        torch.manual_seed(0)
        model = LanguageModel(shape)
        self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.state = make_train_state(model, TrainConfig(compile=self.fast, cuda_graphs=self.fast), self.device)
        if self.fast:
            prove_compiled(self.state, micro_batches(shape.vocab_size, *self.size, 1, self.device)[0][0][0])
        self.scaler = dict(self.state.scaler.state_dict())
        self.alone = replace(self.state, replicas=Alone())
        self.batches = micro_batches(shape.vocab_size, *self.size, self.ranks, self.device)

    def facts(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if self.fast else "cpu", "torch": torch.__version__,
            "world_size": self.ranks, "backend": "nccl" if self.fast else "gloo",
            "batch_size_per_gpu": self.size[0], "seq_length": self.size[1],
        }  # fmt: skip

    def rounds(self, count: int) -> tuple[list[Any], list[Any]]:
        """Times of steps of all ranks, of the slowest of them, and of rank 0 alone."""
        from phase1.measure.throughput.ranks import slowest
        from phase1.parallel import group

        together, alone = [], []
        for number in range(-WARMUP, count):
            group.gate()
            step = self._timed(self.state)
            group.gate()
            one = self._timed(self.alone) if self.rank == 0 else None
            if number >= 0:
                together.append(step)
                alone.append(one)
        return slowest(together), alone

    def _timed(self, state: Any) -> Any:
        from phase1.measure.throughput.timing import Stopwatch
        from phase1.training.step import train_step

        if self.fast:
            torch.cuda.synchronize()
        watch = Stopwatch(self.device)
        train_step(state, self.batches[0][self.rank], watch.mark)
        return watch.step_time()

    def losses(self, state: Any, share: Any) -> list[float]:
        """Of STEPS steps from the start: of each the micro batches that `share` takes of those of all ranks."""
        from phase1.training.step import train_step

        with torch.no_grad():
            for name, tensor in self.state.model.state_dict().items():
                tensor.copy_(self.start[name])
            for values in self.state.optimizer.state.values():
                for value in values.values():
                    value.zero_()
        self.state.scaler.load_state_dict(self.scaler)
        return [float(train_step(state, share(batches))) for batches in self.batches]


def speeds(together: list[Any], alone: list[Any], tokens: int) -> dict[str, Any]:
    from phase1.measure.throughput.timing import median_step
    from phase1.parallel import group
    from phase1.stats.step_times import speed_ratio

    step, one, ranks = median_step(together), median_step(alone), group.size()
    total, single = [s.total_ms for s in together], [s.total_ms for s in alone]
    efficiency, interval = speed_ratio(total, single)
    phases = ("forward", "backward", "communication", "optimizer")
    return {
        "one_gpu_ms": one.total_ms, "together_ms": step.total_ms, "communication_ms": step.communication_ms,
        "phases_ms": {name: getattr(step, f"{name}_ms") for name in phases},
        "one_gpu_phases_ms": {name: getattr(one, f"{name}_ms") for name in phases},
        "one_gpu_tokens_per_s": 1e3 * tokens / one.total_ms, "together_tokens_per_s": 1e3 * ranks * tokens / step.total_ms,
        "speedup": ranks * efficiency, "speedup_ci95": interval and [ranks * end for end in interval],
        "together_samples_ms": total, "one_gpu_samples_ms": single,
    }  # fmt: skip


def micro_batches(vocab_size: int, B: int, T: int, ranks: int, device: str) -> list[list[list[Any]]]:
    """Of every step, and for each rank, a list of one micro batch: ids as frequent as words are."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(STEPS):
        ids = (torch.rand(ranks, B, T + 1, generator=generator) ** 4 * (vocab_size - 1)).long().to(device)
        steps.append([[(part[:, :-1].contiguous(), part[:, 1:].contiguous())] for part in ids])
    return steps


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def measure_resume(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The last losses of two runs on one GPU without a pause, and of one on 1, on all and on 1 GPU again."""
    import tempfile

    began = time.perf_counter()
    flags = (SMOKE if options.smoke else TRAIN).split() + ["--dataset-name", options.dataset_name]
    if options.dataset_name == "builtin":  # of which a tokenizer is trained
        flags += ["--vocab-size", "512" if options.smoke else "2048"]
    tokens = 40 * 8 * 32 if options.smoke else 600 * 64 * 256
    hours = (0.4 / 3600, 1.2 / 3600) if options.smoke else (5 / 3600, 13 / 3600)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("a", "b", "paused")}

        def command(name: str) -> list[str]:
            return ["-m", "phase1", "train", *flags, "--train-tokens", str(tokens), "--out-dir", str(folders[name])]

        one = {"CUDA_VISIBLE_DEVICES": "0"}
        first = subprocess.Popen(
            [sys.executable, *command("b")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(min(1, options.gpus - 1))},
        )  # fmt: skip
        run([sys.executable, *command("a")], **one)
        if first.wait(SECONDS):
            raise SystemExit("scaling: the second run on one GPU failed")
        print(f"two runs without a pause: {time.perf_counter() - began:.0f} s", flush=True)
        steps = []
        for launch, pause, environment in (
            ([sys.executable], hours[0], one),
            (torchrun(options.gpus), hours[1], {}),
            ([sys.executable], None, one),
        ):
            run(launch + command("paused") + (["--max-hours", f"{pause:.7f}"] if pause else []), **environment)
            steps.append(json.loads((folders["paused"] / "checkpoint.json").read_text())["step"])
            print(f"one with pauses: at step {steps[-1]}, {time.perf_counter() - began:.0f} s", flush=True)
        curves = {name: [row for row in rows(path)] for name, path in folders.items()}
    tail = {name: statistics.fmean(row["loss"] for row in curve[-10:]) for name, curve in curves.items()}
    by_step = {name: {row["step"]: row["loss"] for row in curve} for name, curve in curves.items()}
    common = sorted(set(by_step["a"]) & set(by_step["b"]) & set(by_step["paused"]))
    return {
        "ranks": [1, options.gpus, 1], "steps_at_the_pauses": steps[:2], "steps": steps[2], "last_losses": tail,
        "difference_one_to_itself": max(abs(by_step["a"][s] - by_step["b"][s]) for s in common),
        "difference_paused_to_one": max(abs(by_step["a"][s] - by_step["paused"][s]) for s in common),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def print_steps(record: dict[str, Any]) -> None:
    n = record["world_size"]
    interval = record["speedup_ci95"] or [float("nan")] * 2
    print(f"{record['device']}, {record['batch_size_per_gpu']} x {record['seq_length']} a GPU, torch {record['torch']}")
    print(f"1 GPU   {record['one_gpu_ms']:8.2f} ms  {record['one_gpu_tokens_per_s']:12,.0f} tokens/s")
    print(f"{n} GPUs  {record['together_ms']:8.2f} ms  {record['together_tokens_per_s']:12,.0f} tokens/s", end="  ")
    print(f"communication {record['communication_ms']:.2f} ms")
    print(f"weak scaling {record['speedup']:.3f} x of {n} ({interval[0]:.3f} to {interval[1]:.3f})")
    print(f"losses of {STEPS} steps: 1 GPU to itself {record['difference_one_to_itself']:.2e}", end=", ")
    print(f"{n} GPUs to one {record['difference_together_to_one']:.2e}; part took {record['steps_seconds']:.0f} s", flush=True)


def print_resume(record: dict[str, Any]) -> None:
    ranks, pauses = record["ranks"], record["steps_at_the_pauses"]
    print(f"resume on {' -> '.join(map(str, ranks))} GPUs at steps {pauses} of {record['steps']}", end=": ")
    print(f"losses of all steps differ by {record['difference_paused_to_one']:.2e} from one GPU's without a pause", end=", ")
    print(f"which differ by {record['difference_one_to_itself']:.2e} from each other; part took {record['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
