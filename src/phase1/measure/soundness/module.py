"""Whether a model runs at all, moves as a whole, learns, and is built alike in another process."""

import copy
import math

import torch
from torch import Tensor, nn

from phase1.config import ModelConfig, TrainConfig
from phase1.machine.isolate import run_isolated
from phase1.measure.soundness.sample import LEAK, Sample, fails, in_float64, judged, output_type, runs_on_cpu, where
from phase1.measure.workload import SEED
from phase1.records.schema import Check
from phase1.trainable import build, pass_on, raised
from phase1.training.optimizers import kept
from phase1.training.step import make_train_state, train_step

TYPES = "give a new tensor the type of an input or a parameter, and no type by name"
STEPS, RATE = 30, 5e-3  # of training on one text
LEARNT = 0.5  # of the first loss, after them
CHILD_SECONDS = 120.0


def runs(text: Sample) -> Check:
    """The model runs forward and backward at all, evaluated and trained, with losses that are finite."""
    copied = text._replace(model=copy.deepcopy(text.model))
    for training in (False, True):
        tried = copied._replace(training=training)
        found = {"nll": tried.nll(text.ids, text.targets)}
        with tried.mode():
            loss = tried.model.losses(text.ids, text.targets)[0]
            if training:
                loss.backward()
        found["loss"] = loss.detach()
        for what, numbers in found.items():
            if not torch.isfinite(numbers).all():
                got = next(str(x) for x in numbers.flatten().tolist() if not math.isfinite(x))
                mode = "train" if training else "eval"
                remedy = f"look for log and division by 0, and for numbers that overflow{where(text)}"
                return fails("runs", f"expected finite losses; got {got} of {what} in {mode}() mode; {remedy}")
    return Check(name="runs", value=None, limit=None, status="pass", detail="forward and backward, with finite losses")


def moves(text: Sample) -> list[Check]:
    """`.to` moves the model as a whole: its numbers are parameters and buffers, and in float64 it computes in float64."""
    left = left_behind(text.model)
    name, what = "every_tensor_moves", "floating-point tensors in parameters and buffers alone, which .to moves"
    checks = [judged(name, len(left), 0, what, f"{', '.join(left[:5])} beside them", "use register_buffer or nn.Parameter")]
    itself = getattr(text.model, "scores_itself", False)
    name, what = "moves_to_float64", f"float64 {'losses of nll' if itself else 'logits'} of a copy in float64"
    try:
        kind = output_type(in_float64(text))
    except BaseException as error:
        pass_on(error)
        if not runs_on_cpu(text):  # kernels for a GPU, which need not know float64
            detail = f"{what}: nothing runs on the CPU, where this is tried; got {raised(error)}"
            return [*checks, Check.undecided(name, detail)]
        return [*checks, fails(name, f"expected {what}; got {raised(error)}; {TYPES}")]
    if kind == torch.float64:
        return [*checks, Check(name=name, value=None, limit=None, status="pass", detail=what)]
    if itself and kind == torch.float32:
        how = "nll computes in float32, as cross_entropy(logits.float(), ...) does"
        detail = f"{how}: causality has the limit of float32, {LEAK:g}"
        return [*checks, Check.undecided(name, detail)]
    return [*checks, fails(name, f"expected {what}; got {kind}; {TYPES}{where(text)}")]


def left_behind(model: nn.Module) -> list[str]:
    """Attributes of its modules that hold floating-point tensors, also in a list or a dict, but no parameters or buffers."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}  # torch's RNNs list their weights once more
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            loose = (x for x in held if isinstance(x, Tensor) and id(x) not in known)
            if any(x.is_floating_point() or x.is_complex() for x in loose):
                found.append(f"{name} of {path or 'the model'} ({type(module).__name__})")
    return found


def learns(text: Sample) -> list[Check]:
    """Steps on a text that repeats four tokens lower its loss below a half, and reach every parameter."""
    model = copy.deepcopy(text.model)
    state = make_train_state(model, TrainConfig(optimizer="adamw"), text.ids.device.type)  # which learns a short text fastest
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * RATE
    tokens = text.ids[:, :4].repeat(1, text.ids.shape[1] // 4 + 1)[:, : text.ids.shape[1] + 1]
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses = [train_step(state, [batch]).item() for _ in range(STEPS)]
    names = kept(state.optimizer)
    moved = {p: [values[name] for name in names[p] if name != "step"] for p, values in state.optimizer.state.items()}
    reached = {name for name, p in model.named_parameters() if any(moment.any() for moment in moved.get(p, []))}
    missed = [name for name, p in model.named_parameters() if p.requires_grad and name not in reached]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    ratio = losses[-1] / losses[0]  # of a first loss that is finite, or `runs` had failed
    what = f"the loss to fall below {LEARNT:g} of the first in {STEPS} steps on one text"
    got = f"{losses[0]:.3f} to {losses[-1]:.3f}"
    remedy = f"look for detach, for scores that are scaled down or large, and at the start of the weights{where(text)}"
    learnt = judged("learns", ratio, LEARNT, what, got, remedy)
    count, names_of = len(missed) + len(frozen), ", ".join((missed + frozen)[:5])
    got = f"{count} without: {names_of}" + (", ..." if count > 5 else "")
    remedy = "use them in forward, or remove them; make what is not learnt a buffer (register_buffer)"
    return [learnt, judged("every_parameter_learns", count, 0, "a gradient of every parameter", got, remedy)]


def isolated(text: Sample) -> Check:
    """A fresh process builds the same model by its name, as the measurement of memory does: as many numbers, and the same."""
    with torch.random.fork_rng([text.ids.device] if text.ids.is_cuda else []):
        ours = prints_of(text.model.config)
    outcome = run_isolated(prints_of, text.model.config, timeout_s=CHILD_SECONDS)
    theirs, count = outcome.value or [], sum(size for size, *_ in ours)
    built = sum(size for size, *_ in theirs)
    if outcome.value is None or built != count:
        got = outcome.message or f"{built:,}"
        remedy = "let the factory depend on its arguments alone"
        return fails("isolated", f"expected a fresh process to build the same {count:,} parameters; got {got}; {remedy}")
    if [size for size, *_ in theirs] != [size for size, *_ in ours] or not all(map(_alike, ours, theirs)):
        expected = f"a fresh process to build the same {count:,} parameters with one seed of torch's generator"
        remedy = "draw what is random from torch's generator alone, and let the factory depend on its arguments alone"
        return fails("isolated", f"expected {expected}; got other numbers in them; {remedy}")
    detail = "parameters of the model in a fresh process, with the same numbers in them"
    return Check(name="isolated", value=built, limit=count, status="pass", detail=detail)


def _alike(ours: tuple[int, float, float], theirs: tuple[int, float, float]) -> bool:
    """But for rounding, which another number of threads may change; numbers that are not finite are for `runs`."""
    size = max(ours[1], 1e-12)
    return not any(abs(a - b) > LEAK * size for a, b in zip(ours[1:], theirs[1:], strict=True))


def prints_of(config: ModelConfig) -> list[tuple[int, float, float]]:
    """Of each parameter of a new model its size, its norm, and a sum in which each number has another weight."""
    build(config)  # imports its module, which may draw random numbers
    torch.manual_seed(SEED)
    found = []
    for parameter in build(config).parameters():
        numbers = parameter.detach().abs() if parameter.is_complex() else parameter.detach()
        numbers = numbers.flatten().cpu().double()
        weights = torch.arange(1, len(numbers) + 1, dtype=torch.float64).cos()
        found.append((len(numbers), numbers.norm().item(), (numbers * weights).sum().item()))
    return found
