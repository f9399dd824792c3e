"""The records of results/h200 that targets and first table need, as many at a time as the GPUs of this machine allow.

    python benchmarks/all.py OUT --data DATA [--only NAME ...] [--seconds S]
    python benchmarks/all.py --list

OUT gets the records, each where results/h200 has it, and a log a job in OUT/logs. DATA is a folder with wikipedia/ (train and
valid) and wikitext103/ (valid). What is timed has a GPU to itself, trainings and what is inside PyTorch's allocator share one.
With --seconds no job begins that its usual time does not leave room for, and what still runs is interrupted at the end: started
again, a job goes on if its command can. Says how each ended; exit status 1 if one failed, 3 if one was left out or interrupted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHASE1, BENCHMARK = f"{sys.executable} -m phase1", f"{sys.executable} {ROOT}/benchmarks/"
PEERS = f"bash {ROOT}/examples/peers/run.sh"
TEXTS = "--dataset-name {data}/wikipedia --also-evaluate {data}/wikitext103"
FAIR = "--variants equal_parameters transformer_fair_copy transformer_fair no_copy ar_ssm_dense_no_copy --repeats 2"
FAST = "--micro-batch-size 64 --batch-size 64 --compile --cuda-graphs --recompute none"
FULL, STEP = 90_000_000, 64 * 512  # tokens of a training, and of a step
SHARED = 2  # trainings of a GPU at a time: one computes while the other prepares


@dataclass(frozen=True)
class Job:
    """A command that makes a record; `seconds` is what it usually takes on an H200."""

    name: str
    command: str  # {out} and {data} are folders, {slots} is a number for each training that runs at a time
    seconds: int
    gpus: int | None = 1  # None: all of them
    alone: bool = True

    @property
    def shares(self) -> bool:
        """Whether another may run on its GPU."""
        return self.gpus == 1 and not self.alone


def tokens_of_the_same_time() -> int:
    """What the engine trains on while the fastest Transformer trains on all, at the speeds of the record, in whole steps."""
    rows = json.loads((ROOT / "results/h200/kernels/steps.json").read_text())["rows"]
    speeds = {
        row["role"]: row["tokens_per_s"]
        for row in rows
        if row["batch_size"] * row["seq_length"] == STEP and row["seq_length"] == 512 and "htt_output" not in row["settings"]
    }
    return round(FULL * speeds["phase1"] / speeds["baseline_fast"] / STEP) * STEP


def step(role: str, size: str, *settings: str) -> Job:
    name = "-".join(["steps", role, *size.split(), *(setting.split("=")[1] for setting in settings if "output" in setting)])
    return Job(name, f"{BENCHMARK}steps.py {role} {size} {' '.join(settings)} --out-dir {{out}}/kernels", 35)


SIZES = ("64 512", "16 2048", "4 8192", "1 32768", "1 131072")
STEPS = [
    step(role, size, *settings)
    for size in SIZES
    for role, settings in (
        ("phase1", ("recompute=none",)), ("phase1", ("recompute=none", "htt_output=two_level")), ("baseline_fast", ()),
    )
]  # fmt: skip
JOBS = [
    Job("throughput", f"{PHASE1} throughput --decode --save-plots --out-dir {{out}}", 200),
    Job("perplexity", f"{PHASE1} perplexity {TEXTS} {FAST} {FAIR} "
        "--gpus {slots} --resume --checkpoint-dir {out}/checkpoints --out-dir {out}/perplexity_fair", 800, None, False),
    Job("same_time", f"{PHASE1} perplexity {TEXTS} {FAST} --no-baseline --repeats 2 --train-tokens {tokens_of_the_same_time()} "
        "--gpus {slots} --resume --checkpoint-dir {out}/checkpoints --out-dir {out}/perplexity_same_time", 150, None, False),
    Job("memory", f"{PHASE1} memory --out-dir {{out}}", 60),  # what is outside the allocator is the card's
    Job("calibration", f"{BENCHMARK}calibrate_memory.py --workers 8 --out-dir {{out}}", 120, 1, False),
    Job("pieces", f"{BENCHMARK}pieces.py --out-dir {{out}}", 200),
    *STEPS,
    Job("ar_ssm", f"{BENCHMARK}ar_ssm.py --out-dir {{out}}/kernels", 40),
    Job("losses", f"{BENCHMARK}losses.py --out-dir {{out}}/kernels", 20),
    Job("sequence_ops", f"{BENCHMARK}sequence_ops.py --rows core simple_gla --sizes 64x512 --seconds 120 "
        "--out-dir {out}/sequence_ops", 360),
    Job("sequence_ops_all", f"{BENCHMARK}sequence_ops.py --sizes 64x512 1x131072 4x8192 "
        "--out-dir {out}/sequence_ops_all", 600),
    Job("scaling", f"{BENCHMARK}scaling.py --dataset-name {{data}}/wikipedia --out-dir {{out}}", 160, 2),
    Job("context_parallel", f"{BENCHMARK}context_parallel.py --out-dir {{out}}", 60, 2),
    *(Job(f"peers-{name}", f"{PEERS} {{out}}/peers {{data}} {name}", seconds, 1, False) for name, seconds in (
        ("kda", 500), ("gla", 500), ("gated_delta_by_kda", 500), ("llama", 200), ("phase1", 250),
    )),
    Job("peers-compile", f"{PEERS} {{out}}/peers {{data}} compile", 250, 1, False),
    Job("peers-speed", f"{PEERS} {{out}}/peers {{data}} speed table", 250),
]  # fmt: skip


@dataclass
class Running:
    job: Job
    process: "subprocess.Popen[bytes]"
    began: float


@dataclass
class Machine:
    """What runs on each GPU."""

    gpus: int
    running: dict[int, list[Running]] = field(default_factory=dict)

    def room_for(self, job: Job) -> list[int]:
        """GPUs that it could begin on now; none if it has to wait."""
        wanted = self.gpus if job.gpus is None else job.gpus
        free = [gpu for gpu in range(self.gpus) if self._takes(job, self.running.get(gpu, []))]
        free.sort(key=lambda gpu: len(self.running.get(gpu, [])))
        return free[:wanted] if len(free) >= wanted else []

    def _takes(self, job: Job, there: list[Running]) -> bool:
        return not there or (job.shares and len(there) < SHARED and all(running.job.shares for running in there))

    def all(self) -> list[Running]:
        return list({id(running): running for there in self.running.values() for running in there}.values())

    def remove(self, running: Running) -> None:
        for there in self.running.values():
            if running in there:
                there.remove(running)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="folder of the records; before --only")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the two texts (default: data)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs whose names begin so, in this order; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of them; no limit by default")
    parser.add_argument("--list", action="store_true", help="name the jobs and end")
    options = parser.parse_args()
    jobs = list(chosen(JOBS, options.only))
    if not jobs:
        parser.error(f"--only must begin the name of a job; got {' '.join(options.only)}; see --list")
    if options.list:
        print("\n".join(f"{job.name:<32} {job.seconds:>4} s  {job.command}" for job in jobs))
        return 0
    if options.out is None:
        parser.error("OUT, the folder of the records, must be given, before --only; got none")
    import torch  # takes seconds

    machine, end = Machine(torch.cuda.device_count()), time.monotonic() + options.seconds
    try:
        return run(jobs, machine, options.out.resolve(), options.data.resolve(), end)
    finally:
        for running in machine.all():  # after Ctrl-C
            os.killpg(running.process.pid, signal.SIGINT)
            running.process.wait()


def chosen(jobs: list[Job], only: list[str] | None) -> Iterator[Job]:
    """Those whose names begin with a word of `only`, word by word, each once."""
    found = (job for start in only or [""] for job in jobs if job.name.startswith(start))
    yield from {job.name: job for job in found}.values()


def run(jobs: list[Job], machine: Machine, out: Path, data: Path, end: float) -> int:
    """Begin each job as soon as there is room for it, the first ones first; say how each ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # begun in the background it is ignored, by children too
    waiting, failed, left_out = list(jobs), 0, 0
    (out / "logs").mkdir(parents=True, exist_ok=True)
    while waiting or machine.all():
        for job in list(waiting):
            if (job.gpus or 1) > machine.gpus:
                waiting.remove(job)
                left_out += 1
                say(job, f"left out: it needs {job.gpus or 1} GPUs")
            elif time.monotonic() + job.seconds > end:
                waiting.remove(job)
                left_out += 1
                say(job, f"left out: it takes some {job.seconds} s")
            elif gpus := machine.room_for(job):
                waiting.remove(job)
                begin(job, gpus, machine, out, data)
            elif job.alone:
                break  # what comes later and shares would keep it waiting for ever
        for running in machine.all():
            code = running.process.poll()
            late = code is None and time.monotonic() > end
            if late:
                os.killpg(running.process.pid, signal.SIGINT)
                code = running.process.wait()
            if code is not None:
                machine.remove(running)
                right = code in (0, 3)  # 3: nothing is judged
                where = f"see {out}/logs/{running.job.name}.log"
                said = "interrupted" if late else "done" if right else f"FAILED with {code}, {where}"
                say(running.job, f"{said}, {time.monotonic() - running.began:.0f} s")
                left_out += late
                failed += not right and not late
        time.sleep(0.1)
    return 1 if failed else 3 if left_out else 0


def begin(job: Job, gpus: list[int], machine: Machine, out: Path, data: Path) -> None:
    slots = " ".join(str(gpu) for gpu in range(len(gpus)) for _ in range(SHARED))
    command = job.command.format(out=out, data=data, slots=slots)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "PYTHONPATH": search_path()}
    with open(out / "logs" / f"{job.name}.log", "wb") as log:
        process = subprocess.Popen(  # in a group of its own, so that an interrupt reaches all that it starts
            command.split(), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
    running = Running(job, process, time.monotonic())
    for gpu in gpus:
        machine.running.setdefault(gpu, []).append(running)


def search_path() -> str:
    """This checkout, before what is there."""
    return os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]))


def say(job: Job, what: str) -> None:
    print(f"{job.name:<32} {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
