"""Time of a training step over sequence lengths, the models interleaved step by step."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phase1.advice import smaller
from phase1.config import ModelConfig
from phase1.machine.environment import free_ram_bytes
from phase1.machine.isolate import Outcome
from phase1.measure.execution import Compiler, compile_loss, execution, forget_compiled, strict_compilation
from phase1.measure.memory.estimate.allocator import rounded
from phase1.measure.throughput.ranks import attempt, slowest
from phase1.measure.throughput.rounds import round_order
from phase1.measure.throughput.timing import StepTime, Stopwatch, median_step
from phase1.measure.workload import lasting_tensors, make_workload, random_batch, scores_bytes
from phase1.parallel.group import from_first, gathered, rank, size, together
from phase1.parallel.replicas import Alone
from phase1.records.journal import Journal
from phase1.records.schema import Execution, Measurement, Parameters, Scaling, ThroughputResult
from phase1.roster import TRANSFORMERS
from phase1.stats.scaling import fit_scaling
from phase1.stats.step_times import median, median_interval, speed_ratio, with_fastest, with_ratios
from phase1.training.proof import prove_compiled
from phase1.training.step import Batch, TrainState, make_micro_batch, train_step


@dataclass(frozen=True)
class ThroughputPlan:
    """What to run: every model at every length. Of several ranks each has a batch of these sizes."""

    seq_lengths: tuple[int, ...]
    batch_size: int
    warmup_steps: int
    measure_steps: int
    compiled: frozenset[str] = frozenset()  # models whose loss is compiled
    cuda_graphs: bool = False
    batch_sizes: Mapping[str, int] = field(default_factory=dict)  # of the models that do not use `batch_size`
    piece_length: int | None = None  # of the models that train in pieces


@dataclass(frozen=True)
class LengthResult:
    """The result of one model at one length, as a journal keeps it."""

    measurement: Measurement
    warmup_seconds: float
    failure: Outcome[Any] | None


@dataclass
class TimedModel:
    """One model of the comparison, with what has been measured of it."""

    config: ModelConfig
    batch_size: int
    state: TrainState | None = None  # None before it is made, and after a failure
    compiler: Compiler | None = None  # of its loss, if that is to be compiled
    start: Mapping[str, Tensor] = field(default_factory=dict)  # its first weights, if so: trained on noise, gradients are noise
    ran: Execution | None = None  # how the current length runs
    parameters: dict[str, int] | None = None
    failure: Outcome[Any] | None = None
    excluded_seconds: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)  # of the current length
    alone: list[StepTime] = field(default_factory=list)  # of rank 0 without the others, in the same rounds
    peak_bytes: int = 0  # of the current length, on this rank
    warmup_seconds: float = 0.0  # of the current length

    def fail(self, outcome: Outcome[Any]) -> None:
        """Leave the comparison; the memory of the model becomes free."""
        self.failure, self.state = outcome, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close_length(self, seq_length: int) -> LengthResult:
        """The result of the current length; what is counted for a length is reset for the next one."""
        result = LengthResult(_measurement(self, seq_length), self.warmup_seconds, self.failure)
        self.steps, self.alone, self.peak_bytes, self.warmup_seconds, self.ran = [], [], 0, 0.0, None
        return result

    def add(self, result: LengthResult) -> None:
        """Add the result of a length, measured now or by the run that this one resumes."""
        self.measurements.append(result.measurement)
        self.excluded_seconds += result.warmup_seconds
        if result.failure is not None and self.failure is None:
            self.fail(result.failure)


def measure_throughput(
    configs: Mapping[str, ModelConfig],
    plan: ThroughputPlan,
    device: str,
    progress: Callable[[int], object] = lambda tokens: None,
    in_flight: Callable[[], object] = lambda: None,
    journal: Journal | None = None,
) -> dict[str, TimedModel]:
    """Measure every model at every length, shortest first; a model that fails leaves, the others go on.

    Several ranks take every step together, and rank 0 one more without them, so that the two can be compared.
    All models stay on the device and take one step each per round, so that a clock that slows down or a noisy neighbour slows
    all of them; `round_order` says who follows whom. `progress` is called with the tokens of every step, taken or
    skipped, `in_flight` after every launch of a measured step, while the device works on it. A length that `journal` holds is
    not measured again.
    """
    models = {name: TimedModel(config, plan.batch_sizes.get(name, plan.batch_size)) for name, config in configs.items()}
    for name, model in models.items():
        _attempt(model, _make, model, device, plan, name in plan.compiled)
    for seq_length in sorted(set(plan.seq_lengths)):
        measure, name = partial(_measure_length, models, plan, seq_length, progress, in_flight), f"T={seq_length}"
        if journal is not None and name in journal:
            sequences = sum(model.batch_size for model in models.values())
            progress(sequences * seq_length * (plan.warmup_steps + plan.measure_steps))
        for role, result in (journal.case(name, dict[str, LengthResult], measure) if journal else measure()).items():
            models[role].add(result)
    return models


def _measure_length(
    models: dict[str, TimedModel],
    plan: ThroughputPlan,
    seq_length: int,
    progress: Callable[[int], object],
    in_flight: Callable[[], object],
) -> dict[str, LengthResult]:
    """Warm-up and measured rounds at one length; every model compiles for this length alone, all of them or none."""
    if plan.compiled:
        forget_compiled()
    with strict_compilation() if plan.compiled else nullcontext():
        for model in models.values():
            _attempt(model, _prepare, model, seq_length)
        for number in range(-plan.warmup_steps, plan.measure_steps):
            for name in round_order(list(models), number):
                model = models[name]
                _attempt(model, _step, model, seq_length, None if number < 0 else in_flight)
                if together():
                    _attempt(model, _step_alone, model, seq_length, number >= 0)
                progress(model.batch_size * seq_length)
    return {name: model.close_length(seq_length) for name, model in models.items()}


def _attempt(model: TimedModel, function: Callable[..., None], *args: Any) -> None:
    if model.failure is None:
        outcome = attempt(function, *args)
        if outcome.status != "ok":
            model.fail(outcome)


def _make(model: TimedModel, device: str, plan: ThroughputPlan, compiled: bool) -> None:
    began = time.perf_counter()
    graphs, piece_length = plan.cuda_graphs, plan.piece_length
    model.state = make_workload(model.config, device, cuda_graphs=graphs, piece_length=piece_length)
    if compiled:
        model.compiler = compile_loss(model.state)
        model.start = {name: p.detach().to("cpu", copy=True) for name, p in model.state.model.named_parameters()}
    model.parameters = model.state.model.parameter_counts()
    model.excluded_seconds += time.perf_counter() - began


def _prepare(model: TimedModel, seq_length: int) -> None:
    """Before the steps of a length: compile, measure the peak if CUDA graphs would hide it, and record how the model runs.

    CUDA graphs hold their memory for good, so the allocator sees no peak in a replay. The peak is therefore that of an eager
    step, the second of two: by then everything that stays allocated is there.
    Raises RuntimeError if a model that was to be compiled was not, and Unavailable if its compiled gradients are wrong.
    """
    state, began = model.state, time.perf_counter()
    assert state is not None
    if model.compiler is not None:
        for name, parameter in state.model.named_parameters():
            parameter.data.copy_(model.start[name])
        prove_compiled(state, random_batch(model.config.vocab_size, model.batch_size, seq_length, state.device.type))
        model.compiler.calls = 0
    if state.config.cuda_graphs:
        config = replace(state.config, cuda_graphs=False)
        micro_batch = make_micro_batch(state.model, state.scaler, state.dtype, config)
        eager = replace(state, micro_batch=micro_batch, config=config)
        batch = random_batch(model.config.vocab_size, model.batch_size, seq_length, state.device.type)
        for _ in range(2):
            memory = _StepPeak(eager, batch)
            train_step(eager, [batch])
        model.peak_bytes = memory.bytes()
        # graphs of a shorter length would add to gradients that are no more
        state.micro_batch = make_micro_batch(state.model, state.scaler, state.dtype, state.config)
    elif model.compiler is not None:
        train_step(state, [random_batch(model.config.vocab_size, model.batch_size, seq_length, state.device.type)])
    model.ran = execution(state, model.compiler)
    if model.compiler is not None and not model.ran.compiled:
        raise RuntimeError("the model was to be compiled, and ran eagerly; leave out --compile, or run phase1 doctor")
    model.excluded_seconds += time.perf_counter() - began


def _step(model: TimedModel, seq_length: int, in_flight: Callable[[], object] | None) -> None:
    """One step, measured if there is an `in_flight` to call."""
    state = model.state
    assert state is not None
    device = state.device.type
    if device == "cpu" and model.config.attention == "math":
        _require_room(model, seq_length)
    batch = random_batch(model.config.vocab_size, model.batch_size, seq_length, device)
    watch, memory = Stopwatch(device), _StepPeak(state, batch)
    train_step(state, [batch], watch.mark)
    if in_flight is not None:
        in_flight()
    step = watch.step_time()
    if in_flight is None:
        model.warmup_seconds += step.total_ms / 1e3
    else:
        model.steps.append(step)
        model.peak_bytes = max(model.peak_bytes, memory.bytes())


def _step_alone(model: TimedModel, seq_length: int, measured: bool) -> None:
    """One step of rank 0, as if it were the only one, while the others wait."""
    if rank() > 0:
        return
    assert model.state is not None
    state, device = replace(model.state, replicas=Alone()), model.state.device.type
    batch, watch = random_batch(model.config.vocab_size, model.batch_size, seq_length, device), Stopwatch(device)
    train_step(state, [batch], watch.mark)
    step = watch.step_time()
    model.alone += [step] * measured


def _require_room(model: TimedModel, seq_length: int) -> None:
    """Raise MemoryError before the system ends this process for taking too much, which would lose the other models' results."""
    needed, free = scores_bytes(model.config, model.batch_size, seq_length), free_ram_bytes()
    if free is not None and needed > free:
        raise MemoryError(f"the attention scores take about {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")


class _StepPeak:
    """Peak memory of one model's step while other models are resident: they do not change during it, so

    peak = allocator's peak - allocated before the step + what this model keeps between steps and its batch.

    The workspaces of cuBLAS, which the models share, are not in it; in the memory report they are.
    """

    def __init__(self, state: TrainState, batch: Batch) -> None:
        self.own = resident_bytes([*lasting_tensors(state), *batch])
        self.before = 0
        self.counted = state.device.type == "cuda" and not state.config.cuda_graphs
        if state.device.type == "cuda":
            torch.cuda.synchronize()  # so that the step's first event follows no other model's work
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def bytes(self) -> int:
        """The peak since this object was made; 0 on the CPU and in a replay, where the allocator counts nothing."""
        return torch.cuda.max_memory_allocated() - self.before + self.own if self.counted else 0


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the CUDA allocator counts for `tensors`, each storage once."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(rounded(size) for size in sizes.values())


def _measurement(model: TimedModel, seq_length: int) -> Measurement:
    batch_size, failure = model.batch_size, model.failure
    if failure is not None:
        smallest = f"--seq-lengths below {seq_length}"
        advice = f"; {smaller(batch=('--batch-size', batch_size), more=(smallest,))}" if failure.status == "oom" else ""
        failed_before = any(m.status != "ok" for m in model.measurements)
        detail = "skipped: a shorter length failed" if failed_before else failure.message + advice
        return Measurement(seq_length=seq_length, batch_size=batch_size, status=failure.status, detail=detail)
    steps = slowest(model.steps)
    step, ranks = median_step(steps), size()
    total_ms = [step.total_ms for step in steps]
    launch_ms = [step.launch_ms for step in steps if step.launch_ms is not None]
    interval = median_interval(total_ms)
    sequences = ranks * batch_size
    tokens, peaks = sequences * seq_length, gathered(model.peak_bytes)
    return Measurement(
        seq_length=seq_length,
        batch_size=batch_size,
        forward_time_ms=step.forward_ms,
        backward_time_ms=step.backward_ms,
        optimizer_time_ms=step.optimizer_ms,
        total_time_ms=step.total_ms,
        tokens_per_second=tokens / (step.total_ms / 1e3),
        tokens_per_second_ci95=None if interval is None else (tokens / (interval[1] / 1e3), tokens / (interval[0] / 1e3)),
        samples_per_second=sequences / (step.total_ms / 1e3),
        launch_time_ms=median(launch_ms) if launch_ms else None,
        peak_allocated_bytes=max(peaks) or None,
        ran=model.ran,
        step_times_ms=total_ms,
        status="ok",
        **(_many_ranks(step, total_ms, model, peaks, tokens) if ranks > 1 else {}),
    )


def _many_ranks(step: StepTime, total_ms: list[float], model: TimedModel, peaks: list[int], tokens: int) -> dict[str, Any]:
    """The fields of a measurement that only several ranks have; the steps of rank 0 alone are known there."""
    alone_ms = from_first(lambda: [step.total_ms for step in model.alone])
    efficiency, interval = speed_ratio(total_ms, alone_ms)
    return {
        "communication_time_ms": step.communication_ms,
        "tokens_per_second_per_gpu": tokens / len(peaks) / (step.total_ms / 1e3),
        "one_gpu_tokens_per_second": tokens / len(peaks) / (median(alone_ms) / 1e3),
        "scaling_efficiency": efficiency,
        "scaling_efficiency_ci95": interval,
        "peak_by_rank_bytes": peaks if any(peaks) else None,
    }


def throughput_results(models: Mapping[str, TimedModel]) -> dict[str, ThroughputResult]:
    """The records of all models, with their ratios to `baseline` and to the fastest Transformer of each length."""
    results = {role: throughput_result(role, model) for role, model in models.items()}
    baseline = results["baseline"].measurements if "baseline" in results else []
    rivals = {role: results[role].measurements for role in TRANSFORMERS if role in results}
    return {
        role: result.model_copy(update={"measurements": with_fastest(with_ratios(result.measurements, baseline), rivals)})
        for role, result in results.items()
    }


def throughput_result(role: str, model: TimedModel) -> ThroughputResult:
    """The record of a model: ok if it could be measured at one length at least."""
    measured = [m for m in model.measurements if m.status == "ok"]
    failed = [m for m in model.measurements if m.status != "ok"]
    return ThroughputResult(
        model_name=role,
        config=asdict(model.config),
        config_id=model.config.config_id,
        status="ok" if measured else failed[0].status,
        basis="measured",
        parameters=None if model.parameters is None else Parameters(**model.parameters),
        detail=f"T={failed[0].seq_length}: {failed[0].detail}" if failed else "",
        measurements=model.measurements,
        scaling=scaling_of(measured),
        excluded_seconds=model.excluded_seconds,
    )


def scaling_of(measured: list[Measurement]) -> Scaling | None:
    """The fit over the lengths that were measured; None without any."""
    if not measured:
        return None
    seconds = [m.total_time_ms / 1e3 for m in measured if m.total_time_ms is not None]
    return fit_scaling([m.seq_length for m in measured], seconds, [m.step_times_ms for m in measured])
