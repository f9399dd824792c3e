"""Whether a model may be measured at all: it moves, sees no future, its loss is in nats, it learns, and forgets its callers."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from phase1.config import ModelConfig, TrainConfig
from phase1.errors import is_out_of_memory, reason
from phase1.machine.isolate import run_isolated
from phase1.measure.workload import SEED, random_batch
from phase1.ops.cross_entropy import IGNORE
from phase1.records.schema import Check
from phase1.trainable import Trainable, build
from phase1.training.optimizers import described_groups, kept
from phase1.training.step import make_train_state, train_step

LEAK = 1e-3  # of what a changed token does to later losses; rounding does less, a model that looks ahead as much
EXACT_LEAK = 1e-9  # the same in float64, where rounding does a millionth of that
NATS = 5e-3  # relative, of losses that must be equal; FP16 rounds to a fifth of that
CUTS = 8  # positions at which the text is changed
STEPS, RATE = 30, 5e-3  # of training on one text
SCORED = 200  # positions of the check before a perplexity: some chunks of any kernel
LEARNT = 0.5  # of the first loss, after them
CHILD_SECONDS = 120.0


class Sample(NamedTuple):
    """A model on its device, with a batch of two random texts."""

    model: Trainable
    ids: Tensor  # (2, T)
    targets: Tensor  # (2, T)

    def nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """(B, T) float64 nats, of the model as it is evaluated."""
        self.model.eval()
        return self.model.nll(ids, targets)[0].double()


def sample_of(model: Trainable, seq_length: int) -> Sample:
    device = next(model.parameters()).device
    return Sample(model, *random_batch(model.config.vocab_size, 2, seq_length, device.type))


def check_model(config: ModelConfig, seq_length: int, device: str) -> Iterator[Check]:
    """Every check of a new model of `config`, one after the other; a check that raises has failed. The first one builds it."""
    torch.manual_seed(SEED)
    try:
        model = build(config).to(device)
    except ValueError as error:
        yield Check(name="builds", value=None, limit=None, status="fail", detail=str(error))
        return
    detail = f"{described_groups(model)}; on {device}"
    yield Check(name="builds", value=sum(p.numel() for p in model.parameters()), limit=None, status="pass", detail=detail)
    text = sample_of(model, seq_length)
    checks: dict[str, Callable[[Sample], Check | list[Check]]] = {
        "moves": moves, "causal": causal_outputs, "causal_gradients": causal_gradients, "loss_is_nats": loss_is_nats,
        "distribution": distribution, "uniform_is_ln_v": uniform, "deterministic": deterministic,
        "any_length": any_length, "precisions": precisions, "learns": learns, "isolated": isolated,
    }  # fmt: skip
    for name, check in checks.items():
        try:
            found = check(text)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            found = Check(name=name, value=None, limit=None, status="fail", detail=f"{type(error).__name__}: {reason(error)}")
        yield from found if isinstance(found, list) else [found]


def require_sound(model: Trainable, seq_length: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless `model`, trained, sees no future and its losses are those of a distribution, in nats."""
    text = sample_of(model, min(seq_length, SCORED))
    was_training = model.training
    with torch.autocast(text.ids.device.type, dtype, enabled=dtype != torch.float32):
        checks = [causal_outputs(text), *loss_is_nats(text)]
    model.train(was_training)
    if failed := [f"{check.name}: {check.detail}" for check in checks if check.status == "fail"]:
        raise ValueError(f"--model {model.config.model} may not be scored: {failed[0]}; phase1 check-model says more")


def moves(text: Sample) -> list[Check]:
    """`.to` moves the model as a whole: its numbers are parameters and buffers, and in float64 it computes in float64."""
    left = left_behind(text.model)
    detail = "tensors that are neither parameters nor buffers, which .to leaves behind"
    detail += f": {', '.join(left[:5])}; use register_buffer or nn.Parameter" if left else ""
    checks = [Check.at_most("every_tensor_moves", len(left), 0, detail)]
    what = "losses of nll" if getattr(text.model, "scores_itself", False) else "logits"
    name, expected, found = "moves_to_float64", f"a copy in float64 gives float64 {what}", ""
    try:
        kind = output_type(in_float64(text))
        if kind != torch.float64:
            found = f"{kind}; give a new tensor the type of an input or a parameter, and no type by name"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        found = f"{type(error).__name__}: {reason(error)}"
        if not _runs_on_cpu(text):  # kernels for a GPU, which need not know float64
            return [*checks, Check.undecided(name, f"{expected}: nothing runs on the CPU, where this is tried; got {found}")]
    detail = expected + (f"; got {found}" if found else "")
    return [*checks, Check(name=name, value=None, limit=None, status="fail" if found else "pass", detail=detail)]


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


def in_float64(text: Sample) -> Sample:
    """A deep copy of the model in float64, with the same texts: on the CPU, whose operators all know that type."""
    return Sample(copy.deepcopy(text.model).cpu().double(), text.ids.cpu(), text.targets.cpu())


@torch.no_grad()
def output_type(text: Sample) -> torch.dtype:
    """That of the logits, or of the losses where the model scores itself."""
    model = text.model.eval()
    with torch.autocast(text.ids.device.type, enabled=False):
        itself = getattr(model, "scores_itself", False)
        return (model.nll(text.ids, text.targets)[0] if itself else model(text.ids)).dtype


def causal_outputs(text: Sample) -> Check:
    """Changing all inputs from position t on, or all targets, changes no loss before that of position t.

    As the model runs, and then in float64 on the CPU, where rounding hides no small leak.
    """
    half = torch.is_autocast_enabled(text.ids.device.type)
    limit = 10 * LEAK if half else LEAK  # half precision rounds
    worst, seen = _leak(text)
    detail = "largest change of an earlier loss over that of a later one, when tokens change"
    if worst <= limit and (exact := _exact_leak(text)) is not None:
        (worst, seen), limit, detail = exact, EXACT_LEAK, detail + ", in float64"
    return Check.at_most("causal", min(worst, 1e9), limit, detail + (seen if worst > limit else ""))


def _leak(text: Sample) -> tuple[float, str]:
    """The largest change of an earlier loss over that of a later one, and who sees what."""
    worst, seen, before = 0.0, "", text.nll(text.ids, text.targets)
    for t in _cuts(text.ids.shape[1]):
        for what, ids, targets in (
            (f"sees token {t} or a later one: mask the future", _changed(text, text.ids, t), text.targets),
            (f"scores target {t} or a later one: targets are shifted already", text.ids, _changed(text, text.targets, t)),
        ):
            change = (text.nll(ids, targets) - before).abs()
            leak = change[:, :t].max().item() / max(change[:, t:].max().item(), 1e-12)
            if not leak <= worst:  # NaN too
                worst, seen = leak if leak == leak else math.inf, f"; a position before {t} {what}"
    return worst, seen


def _exact_leak(text: Sample) -> tuple[float, str] | None:
    """That of a copy in float64; None where it finds no room, does not run, or rounds on the way: then it tells no more."""
    try:
        exact = in_float64(text)
        with torch.autocast("cpu", enabled=False):
            found = _leak(exact)
            if found[0] <= EXACT_LEAK:
                return found
            with _Roundings() as roundings:
                exact.nll(exact.ids, exact.targets)
    except Exception:
        return None
    return None if roundings.any else found


class _Roundings(TorchDispatchMode):
    """Whether an operator makes numbers of fewer digits from float64: those of constants alone, a mask's, do not count."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken, made = ({x.dtype for x in tree_iter(tree) if isinstance(x, Tensor)} for tree in ((args, kwargs), out))
        self.any |= torch.float64 in taken and bool(made & {torch.float32, torch.float16, torch.bfloat16})
        return out


def causal_gradients(text: Sample) -> Check:
    """The gradients of the losses before t do not depend on the tokens from t on."""
    t = text.ids.shape[1] // 2
    ids = _changed(text, text.ids, t)
    earlier = text.targets.masked_fill(torch.arange(text.ids.shape[1], device=text.ids.device) >= t, IGNORE)
    text.model.eval()
    batches = (text.ids, earlier), (ids, earlier), (ids, text.targets)
    here, there, all_of = (_gradients(text.model, *batch) for batch in batches)
    size = max(g.norm().item() for g in all_of.values())
    worst = max(((here[name] - there[name]).norm().item() / max(size, 1e-12), name) for name in here)
    detail = "largest change of a gradient of losses before t, relative, when tokens from t on change"
    if worst[0] > LEAK:
        detail += f"; that of {worst[1]} depends on the future: correct the backward pass"
    return Check.at_most("causal_gradients", worst[0], LEAK, detail)


def loss_is_nats(text: Sample) -> list[Check]:
    """The training loss is the mean of the losses that are scored, -100 is not among them, and they are cross-entropies."""
    text.model.eval()
    nll = text.nll(text.ids, text.targets)
    with torch.no_grad():
        loss = text.model.losses(text.ids, text.targets)[0].double()
        some = text.targets.masked_fill(nll > nll.median(), IGNORE)  # the easier half: its mean is another
        part = text.model.losses(text.ids, some)[0].double()
        logits = None if getattr(text.model, "scores_itself", False) else text.model(text.ids).double()
    parts = [("loss_is_the_mean", loss, nll.mean(), "loss, and the mean of nll: return the mean over scored targets")]
    detail = "loss where half of the targets are -100, and the mean of nll"
    parts += [("ignores_minus_100", part, nll[some != IGNORE].mean(), detail)]
    if logits is not None:
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.targets.flatten())
        detail = "mean of nll, and the cross-entropy of the logits: in nats, no shift"
        parts += [("nll_is_cross_entropy", nll.mean(), exact, detail)]
    return [_equal(*one) for one in parts]


def distribution(text: Sample) -> Check:
    """Σ over the vocabulary of exp(-nll) is 1: so the losses are in nats, and a uniform model has ln V."""
    V, T = text.model.config.vocab_size, 8
    every = torch.arange(V, device=text.ids.device)
    targets = torch.full((V, T), IGNORE, device=every.device)
    targets[:, -1] = every
    total = 0.0
    for rows in range(0, V, 256):
        nll = text.nll(text.ids[:1, :T].expand(len(every[rows : rows + 256]), T).contiguous(), targets[rows : rows + 256])
        total += (-nll[:, -1]).exp().sum().item()
    return _equal("distribution", torch.tensor(total), torch.tensor(1.0), "sum of exp(-nll) over the vocabulary, and 1: nats")


def uniform(text: Sample) -> Check:
    """With all parameters 0 most models know nothing; their loss is then ln V."""
    blank = text._replace(model=copy.deepcopy(text.model))
    with torch.no_grad():
        for parameter in blank.model.parameters():
            parameter.zero_()
    nll, V = blank.nll(text.ids, text.targets), text.model.config.vocab_size
    spread = (nll.max() - nll.min()).item()
    if not spread <= NATS:  # NaN too
        detail = f"with all parameters 0 its losses differ by {spread:.3g}: it is not uniform; distribution says what counts"
        return Check.undecided("uniform_is_ln_v", detail)
    detail = f"loss in nats of the model with all parameters 0, and ln V, V = {V}: not in bits, no constant in it"
    return _equal("uniform_is_ln_v", nll.mean(), torch.tensor(math.log(V)), detail)


def deterministic(text: Sample) -> Check:
    """Evaluated twice, and with its rows in another order, the model gives the same losses."""
    first, again = text.nll(text.ids, text.targets), text.nll(text.ids, text.targets)
    turned = text.nll(text.ids.flip(0), text.targets.flip(0)).flip(0)
    apart = torch.cat([text.nll(text.ids[i : i + 1], text.targets[i : i + 1]) for i in range(2)])
    worst = max((first - other).abs().max().item() for other in (again, turned, apart)) / max(first.abs().max().item(), 1e-12)
    detail = "largest change of a loss when evaluated again, in another order, alone"
    if worst > LEAK:
        detail += "; something is kept between calls, or drawn at random: respect eval(), and score each row by itself"
    return Check.at_most("deterministic", worst, LEAK, detail)


def any_length(text: Sample) -> Check:
    """Shorter texts run, and their losses are those of the beginning of a longer one."""
    whole, T = text.nll(text.ids, text.targets), text.ids.shape[1]
    worst = 0.0
    for length in dict.fromkeys((1, 7, T // 2 + 1)):
        part = text.nll(text.ids[:, :length].contiguous(), text.targets[:, :length].contiguous())
        worst = max(worst, (part - whole[:, :length]).abs().max().item() / max(whole.abs().max().item(), 1e-12))
    return Check.at_most("any_length", worst, NATS, "largest change of a loss when the text ends earlier")


def precisions(text: Sample) -> Check:
    """A step in the autocast types of the device gives a finite loss that is near that of float32."""
    text.model.eval()
    device, worst = text.ids.device.type, 0.0
    exact = text.model.losses(text.ids, text.targets)[0].item()
    types = [torch.bfloat16] + [torch.float16] * (device == "cuda")
    for dtype in types:
        with torch.autocast(device, dtype):
            loss = text.model.losses(text.ids, text.targets)[0]
        loss.backward()
        finite = all(torch.isfinite(p.grad).all() for p in text.model.parameters() if p.grad is not None)
        text.model.zero_grad(set_to_none=True)
        worst = max(worst, abs(loss.item() - exact) / abs(exact) if finite and math.isfinite(loss.item()) else math.inf)
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in types)
    if not worst < math.inf:
        detail = f"{names}: a loss or a gradient is not finite; compute sums and exponentials in float32"
        return Check(name="precisions", value=None, limit=0.1, status="fail", detail=detail)
    return Check.at_most("precisions", worst, 0.1, f"largest relative change of the loss in {names}")


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
    ratio = losses[-1] / losses[0] if math.isfinite(losses[-1]) else None
    detail = f"loss after {STEPS} steps on one text over that before ({losses[0]:.3f} to {losses[-1]:.3f})"
    learnt = Check.at_most("learns", ratio, LEARNT, detail)
    if ratio is None:
        learnt = Check(name="learns", value=None, limit=LEARNT, status="fail", detail=f"the loss became {losses[-1]}")
    detail = "parameters without a gradient" + (f": {', '.join((missed + frozen)[:5])}" if missed or frozen else "")
    return [learnt, Check.at_most("every_parameter_learns", len(missed) + len(frozen), 0, detail)]


def isolated(text: Sample) -> Check:
    """A fresh process builds the same model by its name, as the measurement of memory does."""
    outcome = run_isolated(parameters_of, text.model.config, timeout_s=CHILD_SECONDS)
    ours = sum(p.numel() for p in text.model.parameters())
    same = outcome.value == ours
    detail = "parameters of the model in a fresh process" + ("" if same else f"; {outcome.message or f'here it has {ours}'}")
    return Check(name="isolated", value=outcome.value, limit=ours, status="pass" if same else "fail", detail=detail)


def parameters_of(config: ModelConfig) -> int:
    return sum(p.numel() for p in build(config).parameters())


def _runs_on_cpu(text: Sample) -> bool:
    try:
        output_type(Sample(copy.deepcopy(text.model).cpu(), text.ids.cpu(), text.targets.cpu()))
    except Exception:
        return False
    return True


def _cuts(T: int) -> list[int]:
    """Where a text is changed: near its beginning and end, and between."""
    return sorted({max(1, min(T - 1, round(T * i / (CUTS + 1)))) for i in range(1, CUTS + 1)} | {1, T - 1})


def _changed(text: Sample, tokens: Tensor, t: int) -> Tensor:
    """Other tokens from position t on."""
    V = text.model.config.vocab_size
    return torch.where(torch.arange(tokens.shape[1], device=tokens.device) >= t, (tokens + 1 + V // 2) % V, tokens)


def _gradients(model: Trainable, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the sum of the scored losses, by parameter."""
    model.zero_grad(set_to_none=True)
    (model.losses(ids, targets)[0] * (targets != IGNORE).sum()).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def _equal(name: str, got: Tensor, want: Tensor, detail: str) -> Check:
    relative = (got - want).abs().item() / max(abs(want.item()), 1e-12)
    detail += f" ({got.item():.4f}, {want.item():.4f})"
    return Check.at_most(name, relative if math.isfinite(relative) else 1e9, NATS, detail)
