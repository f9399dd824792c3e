"""Operators of sequence layers side by side on a GPU: gradients first, then times. Writes sequence_ops.json and .png.

    python benchmarks/sequence_ops.py --out-dir results/h200/sequence_ops

Every row is first checked at the very size that is timed, against its definition in float64: outputs and all gradients of the
first positions of one text, and of the last ones where nothing before them is remembered. A wrong row is FAIL, one that raises
is refused; neither has a time. The rest is timed interleaved, as CUDA graphs where these can be made. Peers are measured where
they are installed: flash-linear-attention, mamba-ssm (its Triton code is enough).
A process of its own does the work, and writes after every row: one that crashes or hangs costs its row alone. Before, rows
that try many forms of their kernels have them compiled, each in a process, many at a time: one by one that takes an hour.
"""

import argparse
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sequence_rows import CHANNELS, HEADS, WINDOW, Inputs, Row, Size, rows
from torch import Tensor
from tune_together import tune_together

from phase1.files import atomic_write

SIZES = ((64, 512), (1, 131072), (4, 8192), (1, 32768))  # the most telling first
RANKS = (32, 16, 64)
CHECKED = 320  # positions: several chunks of any kernel, and a part of one
LIMIT = {torch.float16: 0.05, torch.bfloat16: 0.2, torch.float32: 5e-3}  # relative, of a whole gradient; a wrong one is near 1
COPY_BYTES = 2**31
START_SECONDS = 90.0  # of a process: imports, and the card's context
MEASURING = ("sizes", "ranks", "rows", "precision", "rounds", "seconds", "row_seconds")  # options that the record names
TUNED = ("fla", "mamba2")  # how the names of rows begin that try many forms of their kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=[f"{B}x{T}" for B, T in SIZES], help="B x T, the first ones first")
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=list(RANKS), help="R, the first at every size before the others"
    )
    parser.add_argument("--rows", nargs="+", default=[], help="only rows whose names hold one of these words")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=340.0, help="of the whole run; what is not done by then is skipped")
    parser.add_argument("--row-seconds", type=float, default=60.0, help="of one row, or of the times of a size")
    parser.add_argument("--compile-seconds", type=float, default=240.0, help="at most, before the run; 0 leaves it out")
    parser.add_argument("--compile-processes", type=int, default=6, help="at a time")
    parser.add_argument("--compile-only", action="store_true", help="fill the caches of compiled kernels, and end")
    parser.add_argument("--out-dir", default="results/benchmarks/sequence_ops")
    parser.add_argument("--plot-only", action="store_true", help="draw the plot of the file that is there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    file = Path(options.out_dir) / "sequence_ops.json"
    if not options.plot_only:
        compile_tuned(options)
        if options.compile_only:
            return 0
        measure(options, file)
    record = json.loads(file.read_text())
    if options.plot_only:
        print("\n".join(table(record)))
    plot(record, file.with_suffix(".png"))
    wrong = [row for row in record["rows"] if row["row"].startswith("phase1") and row["status"] in ("FAIL", "refused")]
    return 1 if wrong else 0


# The parent: gives work to a process, and takes what it says.


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Sizes with the rows that run at each, by importance: every size at the first rank, then the other ranks."""
    sizes = [tuple(map(int, text.lower().split("x"))) for text in options.sizes]
    wanted = [row for row in rows() if not options.rows or any(word in row.name for word in options.rows)]
    found = []
    for R in options.ranks:
        for B, T in sizes:
            names = [
                row.name
                for row in wanted
                if (row.ranked or options.ranks[0] == R) and (row.only_rank in (None, R) or options.ranks[0] == R)
            ]
            found.append({"B": B, "T": T, "R": R, "rows": names})
    return found


def compile_tuned(options: argparse.Namespace) -> None:
    """Run each tuned row once at every rank, at the first size; what is compiled stays in Triton's cache."""
    first = options.sizes[0].lower()
    waiting = [
        {"B": job["B"], "T": job["T"], "R": job["R"], "rows": [name]}
        for job in jobs(options)
        for name in job["rows"]
        if name.startswith(TUNED) and f"{job['B']}x{job['T']}" == first
    ]
    command = [sys.executable, __file__, "--worker", "--compile-only", "--precision", options.precision]
    ends, running, total = time.monotonic() + options.compile_seconds, [], len(waiting)
    while (waiting or running) and time.monotonic() < ends:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < options.compile_processes:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            assert process.stdin is not None
            process.stdin.write(json.dumps([waiting.pop(0)]).encode())
            process.stdin.close()
            running.append(process)
        time.sleep(0.2)
    for process in running:
        process.kill()
        process.wait()
    print(f"compiled: {total - len(waiting) - len(running)} of {total} tuned rows, {len(running)} broken off", flush=True)


def measure(options: argparse.Namespace, file: Path) -> None:
    """Do all jobs, each in a process that lives as long as it can; the file is whole after every row."""
    ends, left, found = time.monotonic() + options.seconds, jobs(options), []
    facts: dict[str, Any] = {"device": "", "torch": torch.__version__, "copy_bytes_per_second": None}
    settings = {name: value for name, value in vars(options).items() if name in MEASURING}

    def keep() -> None:
        record = facts | {"heads": HEADS, "channels": CHANNELS, "window": WINDOW, "options": settings, "rows": found}
        atomic_write(file, (json.dumps(record, indent=1) + "\n").encode())

    def add(row: dict[str, Any]) -> None:
        found.append(row)
        print(line(row, facts["copy_bytes_per_second"]), flush=True)
        keep()

    file.parent.mkdir(parents=True, exist_ok=True)
    while left and time.monotonic() < ends:
        doing: dict[str, Any] = {}
        for message in answers(options, left, ends):
            kind = message["kind"]
            if kind == "facts":
                facts |= message["facts"]
            elif kind == "begin":
                doing = message
            elif kind == "row":
                add(message["row"])
                left[0]["rows"].remove(message["row"]["row"])
            elif kind == "job done":
                left.pop(0)
            elif kind == "ended" and left:  # by itself when all is done, else by a crash or for taking too long
                if not doing:
                    raise SystemExit(f"sequence_ops: no process starts: {message['why']}")
                if time.monotonic() >= ends:
                    break
                blamed = [doing["row"]] if doing["row"] in left[0]["rows"] else list(left[0]["rows"])
                for name in blamed:
                    left[0]["rows"].remove(name)
                    add({k: left[0][k] for k in "BTR"} | {"row": name, "status": "refused", "note": message["why"]})
                    for job in left[1:] if "seconds" in message["why"] else []:  # it would take as long at other sizes
                        job["rows"] = [other for other in job["rows"] if other != name]
                if not left[0]["rows"]:
                    left.pop(0)
    for job in left:
        for name in job["rows"]:
            found.append({k: job[k] for k in "BTR"} | {"row": name, "status": "skipped", "note": "over the time of the run"})
    keep()


def answers(options: argparse.Namespace, left: list[dict[str, Any]], ends: float) -> Iterator[dict[str, Any]]:
    """What a new process says of the jobs in `left`, to its end; it is killed where it is silent for too long."""
    command = [sys.executable, __file__, "--worker", "--precision", options.precision, "--rounds", str(options.rounds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for text in process.stdout:
            lines.put(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    assert process.stdin is not None
    process.stdin.write(json.dumps(left))
    process.stdin.close()
    patience = START_SECONDS
    try:
        while True:
            allowed = min(patience, max(0.0, ends - time.monotonic()))
            try:
                text = lines.get(timeout=allowed)
            except queue.Empty:
                over = f"over {patience:.0f} seconds" if allowed == patience else "over the time of the run"
                yield {"kind": "ended", "why": over}
                return
            if text is None:
                code = process.wait()
                yield {"kind": "ended", "why": f"the process ended with {code}"}
                return
            if text.startswith("{"):
                message = json.loads(text)
                patience = options.row_seconds
                yield message
    finally:
        process.kill()
        process.wait()


# The worker: checks and times the rows of one size after another.


def worker(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        tune_together()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    left = json.loads(sys.stdin.read())
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    say("facts", facts={"device": name, "copy_bytes_per_second": copy_speed(device)})
    every = {row.name: row for row in rows()}
    for job in left:
        size, ready = Size(job["B"], job["T"], job["R"]), {}
        for name in job["rows"]:
            say("begin", row=name)
            torch.manual_seed(0)
            result, steps = prepared(every[name], size, device, dtype)
            if options.compile_only:
                continue
            print(f"  checked {name}, {size}: {result.get('worst_error', result['note'])}", file=sys.stderr, flush=True)
            if steps is None:
                say("row", row=result)
            else:
                ready[name] = (result, steps)
        for name, times in timed({name: steps for name, (_, steps) in ready.items()}, options.rounds, device).items():
            say("row", row=ready[name][0] | times)
        ready.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
        say("job done")


def say(kind: str, **more: Any) -> None:
    print(json.dumps({"kind": kind} | more), flush=True)


Steps = dict[str, Callable[[], None]]


def prepared(row: Row, size: Size, device: str, dtype: torch.dtype) -> tuple[dict[str, Any], Steps | None]:
    """The row's result so far, and what is timed of it: None where it is refused, wrong, or not for this size."""
    result: dict[str, Any] = {"row": row.name, "what": row.what, "status": "ok", "note": ""} | asdict(size)
    if not row.ranked:
        result["R"] = None
    if why := row.refuse(size):
        return result | {"status": "skipped", "note": why}, None
    try:
        operator = row.load()
        inputs = row.operands(size, device, dtype)
        worst, which = worst_error(row, operator, inputs, size)
        result |= {"worst_error": worst, "worst": which, "ideal_bytes": ideal_bytes(inputs, size, dtype)}
        if not worst <= LIMIT[dtype]:
            return result | {"status": "FAIL", "worst_error": min(worst, 1e9), "note": f"{which} differs from float64"}, None
        return result, steps_of(operator, inputs)
    except Exception as error:
        return result | refusal(error), None


def refusal(error: Exception) -> dict[str, str]:
    if isinstance(error, ModuleNotFoundError):
        return {"status": "skipped", "note": f"not installed: {error}"}
    return {"status": "refused", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}


def worst_error(row: Row, operator: Callable[[Inputs], Tensor], inputs: Inputs, size: Size) -> tuple[float, str]:
    """Largest relative error of output or gradient, and whose: at the first text's beginning, and at the last one's end."""
    n = min(size.T, CHECKED)
    found = compared(row, operator, inputs, size, slice(0, 1), slice(0, n), 0)
    if row.values is not None and n + WINDOW < size.T:
        late = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
        lead = WINDOW  # positions that a window of the others looks back to
        with torch.no_grad():
            late[row.values][:, : size.T - n - lead] = 0  # nothing is remembered
        more = compared(row, operator, late, size, slice(size.B - 1, size.B), slice(size.T - n - lead, size.T), lead)
        found += [(error, f"{name} at the end") for error, name in more]
    return max((error if error == error else float("inf"), name) for error, name in found)


def compared(
    row: Row, operator: Callable[[Inputs], Tensor], inputs: Inputs, size: Size, text: slice, part: slice, lead: int
) -> list[tuple[float, str]]:
    """Errors of the outputs of a part of one text, past its first `lead` positions, and of the gradients of a sum of them."""
    whole = {name: tensor.ndim < 3 or tensor.shape[:2] != (size.B, size.T) for name, tensor in inputs.items()}
    parts = {name: tensor if whole[name] else tensor[text, part] for name, tensor in inputs.items()}
    few = {name: tensor.detach().double().requires_grad_() for name, tensor in parts.items()}
    want = row.define(few)
    weights = torch.randn(want.shape, device=want.device, dtype=torch.float64)
    weights[:, :lead] = 0
    got = operator(inputs)
    placed = torch.zeros(got.shape, device=got.device, dtype=got.dtype)
    placed[text, part] = weights.to(got.dtype)
    ours = torch.autograd.grad(got, list(inputs.values()), placed)
    exact = torch.autograd.grad(want, list(few.values()), placed[text, part].double())
    errors = [(relative(got[text, part][:, lead:].double(), want[:, lead:]), "y")]
    for (name, shared), mine, theirs in zip(whole.items(), ours, exact, strict=True):
        if shared:
            errors.append((relative(mine.double(), theirs), f"d{name}"))
            continue
        inside = relative(mine[text, part][:, lead:].double(), theirs[:, lead:])
        after = part.stop
        leak = mine[text, after:].double().norm() / theirs.norm().clamp(min=1e-9) if after < size.T else torch.zeros(())
        errors.append((max(inside, leak.item()) if inside == inside else inside, f"d{name}"))
    return errors


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp(min=1e-9)).item()


def ideal_bytes(inputs: Inputs, size: Size, dtype: torch.dtype) -> int:
    """Forward and backward: inputs read twice, their gradients written, the output written and its gradient read."""
    output = size.B * size.T * HEADS * CHANNELS * torch.finfo(dtype).bits // 8
    return 3 * sum(tensor.numel() * tensor.element_size() for tensor in inputs.values()) + 2 * output


def steps_of(operator: Callable[[Inputs], Tensor], inputs: Inputs) -> Steps:
    leaves = list(inputs.values())
    ones = torch.randn_like(operator(inputs))

    def forward() -> None:
        with torch.no_grad():
            operator(inputs)

    def both() -> None:
        torch.autograd.grad(operator(inputs), leaves, ones)

    return {"forward": forward, "both": both}


def timed(ready: dict[str, Steps], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Median milliseconds of every row's steps, launched as CUDA graphs where they can be, the rows one after the other."""
    launches: dict[tuple[str, str], Callable[[], None]] = {}
    results: dict[str, dict[str, Any]] = {name: {"launch": "graph" if device == "cuda" else "eager"} for name in ready}
    for name, steps in ready.items():
        say("begin", row=name)
        try:
            for step, run in steps.items():
                for _ in range(3):
                    run()
                launches[name, step], how = graphed(run, device)
                if how:
                    results[name] |= {"launch": "eager", "note": f"no CUDA graph: {how}"}
        except Exception as error:
            results[name] |= refusal(error)
            launches = {key: launch for key, launch in launches.items() if key[0] != name}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in launches}
    say("begin", row="(all)")
    order = list(launches)
    for number in range(-2, rounds):
        for key in order if number % 2 else reversed(order):
            milliseconds = clock(launches[key], device)
            if number >= 0:
                taken[key].append(milliseconds)
    for (name, step), times in taken.items():
        results[name][f"{step}_ms"] = statistics.median(times)
    return results


def graphed(run: Callable[[], None], device: str) -> tuple[Callable[[], None], str]:
    """`run` as a CUDA graph, or itself and why not."""
    if device != "cuda":
        return run, ""
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        return run, " ".join(str(error).split())[:100]
    return graph.replay, ""


def clock(run: Callable[[], None], device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_speed(device: str) -> float:
    """Bytes read and written per second by the copy of a large tensor: what the card's memory gives."""
    source = torch.randint(255, (COPY_BYTES if device == "cuda" else 2**24,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.numel() / (statistics.median(times[2:]) / 1e3)


# What is shown.


def line(row: dict[str, Any], copy: float | None) -> str:
    size = f"{row['B']} x {row['T']}, R {row['R'] or '-'}"
    if row["status"] != "ok":
        return f"{size:<20} {row['row']:<28} {row['status']:<8} {row['note']}"
    both, ns = row["both_ms"], 1e6 * row["both_ms"] / (row["B"] * row["T"])
    speed = row["ideal_bytes"] / (both / 1e3)
    share = f"{speed / copy:6.1%}" if copy else ""
    numbers = f"{row['forward_ms']:9.3f} {both:9.3f} ms {ns:9.2f} ns/token {speed / 1e9:8.0f} GB/s {share}"
    return f"{size:<20} {row['row']:<28} {row['worst_error']:.1e} {numbers} {row['launch']} {row['note']}"


def table(record: dict[str, Any]) -> list[str]:
    copy = record["copy_bytes_per_second"]
    speed = f", copies {copy / 1e9:.0f} GB/s" if copy else ""
    head = f"{record['device']}, torch {record['torch']}{speed}; error against float64, ms forward and with backward"
    return [head, *(line(row, copy) for row in record["rows"])]


def plot(record: dict[str, Any], path: Path) -> None:
    """Nanoseconds a token over sizes, at the first rank; rows that are wrong or refused are named above."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    first = record["options"]["ranks"][0]
    chosen = [row for row in record["rows"] if row["R"] in (None, first)]
    sizes = sorted({(row["B"], row["T"]) for row in chosen}, key=lambda size: (size[1], size[0]))
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes, colours = figure.subplots(), colormaps["tab20"].colors
    for number, name in enumerate(dict.fromkeys(row["row"] for row in chosen)):
        at = {(row["B"], row["T"]): row for row in chosen if row["row"] == name and row["status"] == "ok"}
        points = [(i, 1e6 * at[size]["both_ms"] / (size[0] * size[1])) for i, size in enumerate(sizes) if size in at]
        if points:
            style = "-o" if name.startswith("phase1") else "--s"
            colour = colours[(2 * number + number // 10) % 20]  # neighbours are shades of one: far apart
            axes.plot(*zip(*points), style, label=name, color=colour, markersize=5)
    axes.set_xticks(range(len(sizes)), [f"{B} x {T:,}" for B, T in sizes])
    axes.set(yscale="log", xlabel="texts x positions", ylabel="ns a token, forward and backward")
    bad = dict.fromkeys(f"{row['row']} ({row['status']})" for row in chosen if row["status"] in ("FAIL", "refused"))
    note = f"\nno time: {', '.join(bad)}" if bad else ""
    sizes_of = f"{record['options']['precision']}, R = {first}, P = {record['channels']}"
    axes.set_title(f"{record['device']}, {sizes_of}{note}", fontsize=9)
    axes.grid(alpha=0.3)
    if axes.lines:
        figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"written: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
