"""Whether a model may be measured at all: it moves, sees no future, its loss is in nats, it learns, and forgets its callers."""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from phase1.config import ModelConfig, TrainConfig
from phase1.errors import is_out_of_memory
from phase1.machine.isolate import run_isolated
from phase1.measure.workload import SEED, random_batch
from phase1.ops.cross_entropy import IGNORE
from phase1.records.schema import Check
from phase1.trainable import OwnModel, Trainable, WrongOutput, WrongReference, build, defined, pass_on, raised
from phase1.training.optimizers import described_groups, kept
from phase1.training.step import make_train_state, train_step

LEAK = 1e-3  # of what a changed token does to later losses; rounding does less, a model that looks ahead as much
EXACT_LEAK = 1e-9  # the same in float64, where rounding does a millionth of that
NATS = 5e-3  # relative, of losses that must be equal; FP16 rounds to a fifth of that
CUTS = 8  # positions at which the text is changed
FEW_CUTS = 2  # of a long text
LONG = (320, 256, 192, 128)  # T of the second check of causality, the first that the model takes: above chunks and windows
STEPS, RATE = 30, 5e-3  # of training on one text
SCORED = 200  # positions of the check before a perplexity: some chunks of any kernel
MASK = "mask the future"
TYPES = "give a new tensor the type of an input or a parameter, and no type by name"
LEARNT = 0.5  # of the first loss, after them
CHILD_SECONDS = 120.0


COMPARING = ("causal", "causal_in_training", "causal_gradients", "loss_is_the_mean", "distribution", "any_length", "precisions",
             "causal_at_length")  # fmt: skip
"""Checks that compare two forwards, by their first name: they tell nothing of a model whose forwards differ by themselves."""


MAY_NOT = "may not be scored"  # phase1.checks.perplexity looks for it


class Unsound(ValueError):
    """A model that may not be scored: its number would mean nothing."""


class Sample(NamedTuple):
    """A model on its device, with a batch of two random texts."""

    model: Trainable
    ids: Tensor  # (2, T)
    targets: Tensor  # (2, T)
    training: bool = False  # in that mode, with the same random numbers in every forward

    def nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """(B, T) float64 nats, of the model as it is evaluated, or trained."""
        with self.mode():
            return self.model.nll(ids, targets)[0].double()

    @contextmanager
    def mode(self) -> Iterator[None]:
        self.model.train(self.training)
        devices = [self.ids.device] if self.ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.training):
            if self.training:
                torch.manual_seed(SEED)
            yield


def sample_of(model: Trainable, seq_length: int, rows: int = 2) -> Sample:
    device = next(model.parameters()).device
    return Sample(model, *random_batch(model.config.vocab_size, rows, seq_length, device.type))


def check_model(config: ModelConfig, seq_length: int, device: str) -> Iterator[Check]:
    """Every check of a new model of `config`, one after the other; a check that raises has failed.

    The first builds the model and the second runs it: where either fails there is nothing to check. Raises ValueError where
    `config` names no model.
    """
    torch.manual_seed(SEED)
    built, text = _guarded("builds", lambda: _built(config, seq_length, device))
    yield from built
    if text is None:
        return
    ran, _ = _guarded("runs", lambda: ([runs(text)], None))
    yield from ran
    if ran[0].status == "fail":
        return
    checks: dict[str, Callable[[Sample], Check | list[Check]]] = {
        "deterministic": deterministic, "every_tensor_moves": moves, "causal": causal_outputs,
        "causal_in_training": causal_in_training, "causal_gradients": causal_gradients, "loss_is_the_mean": loss_is_nats,
        "distribution": distribution, "uniform_is_ln_v": uniform, "any_length": any_length, "precisions": precisions,
        "learns": learns, "isolated": isolated, "causal_at_length": causal_at_length,
    }  # fmt: skip
    repeats, leaks = True, ""
    for name, check in checks.items():
        if not repeats and name in COMPARING:
            yield Check.undecided(name, "it compares two forwards, which differ by themselves: correct deterministic first")
            continue
        if leaks and name == "causal_at_length":
            yield Check.undecided(name, f"correct {leaks} first")
            continue
        found, _ = _guarded(name, lambda check=check: (check(text), None))  # type: ignore[misc]
        yield from found
        if name == "deterministic":
            repeats = found[0].status == "pass" or _guarded(name, lambda: ([], _differs(text)))[1] == ""
        leaks = leaks or next((one.name for one in found if one.status == "fail" and one.name.startswith("causal")), "")


def _built(config: ModelConfig, seq_length: int, device: str) -> tuple[Check, Sample]:
    model = build(config).to(device)
    detail = f"{described_groups(model)}; on {device}"
    check = Check(name="builds", value=sum(p.numel() for p in model.parameters()), limit=None, status="pass", detail=detail)
    return check, sample_of(model, seq_length)


def _guarded(name: str, check: Callable[[], tuple[Any, Any]]) -> tuple[list[Check], Any]:
    """What `check` gives, as a list of checks and something more; one that fails, and nothing, where it raises."""
    try:
        found, more = check()
    except BaseException as error:  # a user's code may raise SystemExit
        pass_on(error)
        if isinstance(error, WrongReference):
            raise
        if isinstance(error, WrongOutput) or (name == "builds" and isinstance(error, ValueError)):
            return [_fails(name, re.sub(r"^--model \S+ ?", "", str(error)))], None  # has what it expected, and the remedy
        return [_fails(name, f"expected {EXPECTED.get(name, 'no error')}; got {raised(error)}; correct that line")], None
    return found if isinstance(found, list) else [found], more


EXPECTED = {
    "builds": "a model",
    "runs": "forward and backward of a batch",
    "any_length": "losses of texts of any length",
    "isolated": "a fresh process to build the model",
}


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
                remedy = f"look for log and division by 0, and for numbers that overflow{_where(text)}"
                return _fails("runs", f"expected finite losses; got {got} of {what} in {mode}() mode; {remedy}")
    return Check(name="runs", value=None, limit=None, status="pass", detail="forward and backward, with finite losses")


def require_sound(model: Trainable, seq_length: int, dtype: torch.dtype) -> None:
    """Raise Unsound unless `model`, trained, sees no future and its losses are those of a distribution, in nats."""
    was_training = model.training
    try:
        with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype != torch.float32):
            for why in _faults(model, seq_length):
                raise Unsound(f"--model {model.config.model} {MAY_NOT}: {why}")
    finally:
        model.train(was_training)


def _faults(model: Trainable, seq_length: int) -> Iterator[str]:
    text = sample_of(model, min(seq_length, SCORED))
    if not torch.isfinite(text.nll(text.ids, text.targets)).all():
        yield "expected finite losses; got others; train with a smaller --learning-rate"
    if difference := _differs(text):
        yield f"expected the same losses twice; got {difference}; keep nothing between calls, draw nothing in eval()"
    checks = [causal_outputs(text), *loss_is_nats(text)]
    if seq_length > SCORED:
        checks += _causal_if_it_fits(sample_of(model, seq_length, rows=1))
    yield from (check.detail for check in checks if check.status == "fail")


def _causal_if_it_fits(text: Sample) -> list[Check]:
    """The check at the length of the score, as the model runs, where there is room for all logits of it."""
    try:
        worst, seen = _leak(text, FEW_CUTS)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return []
    return [_causal("causal", worst, _rounding(text), seen, f" at T = {text.ids.shape[1]:,}")]


def moves(text: Sample) -> list[Check]:
    """`.to` moves the model as a whole: its numbers are parameters and buffers, and in float64 it computes in float64."""
    left = left_behind(text.model)
    name, what = "every_tensor_moves", "floating-point tensors in parameters and buffers alone, which .to moves"
    checks = [_judged(name, len(left), 0, what, f"{', '.join(left[:5])} beside them", "use register_buffer or nn.Parameter")]
    itself = getattr(text.model, "scores_itself", False)
    name, what = "moves_to_float64", f"float64 {'losses of nll' if itself else 'logits'} of a copy in float64"
    try:
        kind = output_type(in_float64(text))
    except BaseException as error:
        pass_on(error)
        if not _runs_on_cpu(text):  # kernels for a GPU, which need not know float64
            detail = f"{what}: nothing runs on the CPU, where this is tried; got {raised(error)}"
            return [*checks, Check.undecided(name, detail)]
        return [*checks, _fails(name, f"expected {what}; got {raised(error)}; {TYPES}")]
    if kind == torch.float64:
        return [*checks, Check(name=name, value=None, limit=None, status="pass", detail=what)]
    if itself and kind == torch.float32:
        how = "nll computes in float32, as cross_entropy(logits.float(), ...) does"
        detail = f"{how}: causality has the limit of float32, {LEAK:g}"
        return [*checks, Check.undecided(name, detail)]
    return [*checks, _fails(name, f"expected {what}; got {kind}; {TYPES}{_where(text)}")]


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
    return text._replace(model=copy.deepcopy(text.model).cpu().double(), ids=text.ids.cpu(), targets=text.targets.cpu())


@torch.no_grad()
def output_type(text: Sample) -> torch.dtype:
    """That of the logits, or of the losses where the model scores itself."""
    model = text.model.eval()
    with torch.autocast(text.ids.device.type, enabled=False):
        itself = getattr(model, "scores_itself", False)
        return (model.nll(text.ids, text.targets)[0] if itself else model(text.ids)).dtype


def causal_outputs(text: Sample, name: str = "causal", cuts: int = CUTS) -> Check:
    """Changing all inputs from position t on, or all targets, changes no loss before that of position t.

    As the model runs, and then in float64 on the CPU, where rounding hides no small leak.
    """
    (worst, seen), limit, where = _leak(text, cuts), _rounding(text), ""
    if worst <= limit and (exact := _exact_leak(text, cuts)) is not None:
        (worst, seen), limit, where = exact, EXACT_LEAK, " in float64"
    return _causal(name, worst, limit, seen, where + (" in train() mode" if text.training else ""))


def _rounding(text: Sample) -> float:
    """The largest leak that may be rounding: half precision rounds more."""
    return 10 * LEAK if torch.is_autocast_enabled(text.ids.device.type) else LEAK


def _causal(name: str, worst: float, limit: float, seen: tuple[str, str], where: str) -> Check:
    got = f"{seen[0]} ({worst:.2g} x the change of later ones)" if math.isfinite(worst) else "losses that are not finite"
    return _judged(name, worst, limit, f"no loss{where} to change when a later token does", got, seen[1])


def causal_in_training(text: Sample) -> Check:
    """The same of a copy in train() mode: dropout and noise are those of one state of the random generator."""
    name = "causal_in_training"
    copied = text._replace(model=copy.deepcopy(text.model), training=True)
    if difference := _differs(copied):
        detail = (
            f"in train() mode two forwards with one state of the random generator differ by {difference}: nothing to compare"
        )
        return Check.undecided(name, detail)
    check = causal_outputs(copied, name)
    if check.status == "pass" and (leak := _loss_leak(copied)) > LEAK:
        return _causal(name, leak, LEAK, ("a loss that sees later tokens than it scores", MASK), " in train() mode")
    return check


def _loss_leak(text: Sample) -> float:
    """That of `loss`, where it is no mean of nll: how much later tokens change what earlier targets add to it.

    A difference of two losses of the same tokens: what is added to the loss whatever the targets are does not count.
    """
    worst = 0.0
    for t in _cuts(text.ids.shape[1], FEW_CUTS):
        later = torch.arange(text.ids.shape[1], device=text.ids.device) >= t
        targets = [x.masked_fill(later, IGNORE) for x in (text.targets, _changed(text, text.targets, 0))]
        differences = []
        for ids in (text.ids, _changed(text, text.ids, t)):
            losses = []
            for earlier in targets:
                with text.mode(), torch.no_grad():
                    losses.append(text.model.losses(ids, earlier)[0].item())
            differences.append(losses[0] - losses[1])
        if abs(differences[0]) > LEAK:  # else rounding is all there is
            worst = max(worst, abs(differences[1] / differences[0] - 1))
    return worst


def causal_at_length(text: Sample) -> Check:
    """Causality, evaluated and trained, of a text above the chunks and windows of most models, if the model takes one."""
    name, T, why = "causal_at_length", text.ids.shape[1], ""
    for length in (length for length in LONG if length > T):
        longer = sample_of(text.model, length)
        try:
            probe = in_float64(longer) if longer.ids.is_cuda and _runs_on_cpu(text) else longer
            probe.nll(probe.ids, probe.targets)  # on the CPU: an index too large is the end of all work on a GPU
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = why or f": T = {length} gives {raised(error)}"
            continue
        check = causal_outputs(longer, name, FEW_CUTS)
        trained = longer._replace(model=copy.deepcopy(text.model), training=True)
        if check.status == "pass" and not _differs(trained):
            check = causal_outputs(trained, name, FEW_CUTS)
        return check.model_copy(update={"detail": f"T = {length}: {check.detail}"})
    if not why:
        return Check(name=name, value=None, limit=None, status="pass", detail=f"T = {T}: as above")
    return Check.undecided(name, f"causal up to T = {T} only{why}")


def causal_up_to(checks: Iterable[Check]) -> int | None:
    """The length of the longest text that was found causal, of all checks of a model; None if `causal` tells."""
    found = next((check for check in checks if check.name == "causal_at_length" and check.status == "pass"), None)
    return int(found.detail.removeprefix("T = ").partition(":")[0]) if found else None


def _leak(text: Sample, cuts: int = CUTS) -> tuple[float, tuple[str, str]]:
    """The largest change of an earlier loss over that of a later one, who sees what, and what to do about it."""
    worst, seen, before = 0.0, ("", ""), text.nll(text.ids, text.targets)
    for t in _cuts(text.ids.shape[1], cuts):
        for what, remedy, ids, targets in (
            (f"sees token {t} or later", MASK, _changed(text, text.ids, t), text.targets),
            (f"scores target {t} or later", "targets are shifted already", text.ids, _changed(text, text.targets, t)),
        ):
            change = (text.nll(ids, targets) - before).abs()
            leak = change[:, :t].max().item() / max(change[:, t:].max().item(), 1e-12)
            if not leak <= worst:  # NaN too
                worst, seen = leak if leak == leak else math.inf, (f"a position before {t} that {what}", remedy)
    return worst, seen


def _differs(text: Sample) -> str:
    """Empty if two forwards of the same give the same losses, else by how much they differ: as it runs, or in float64."""
    for limit in (LEAK, EXACT_LEAK):
        try:
            tried = text if limit == LEAK else in_float64(text)
            with torch.autocast(
                tried.ids.device.type, enabled=limit == LEAK and torch.is_autocast_enabled(tried.ids.device.type)
            ):
                first, again = (tried.nll(tried.ids, tried.targets) for _ in range(2))
        except Exception:
            if limit == LEAK:
                raise
            return ""  # which cannot tell more
        change = _change(first, again)
        if not change <= limit:
            return f"{change:.2g} of the largest"
    return ""


def _change(first: Tensor, other: Tensor) -> float:
    """The largest, over the largest loss; infinite where one is not finite."""
    change = (first - other).abs().max().item() / max(first.abs().max().item(), 1e-12)
    return change if change == change else math.inf


def _exact_leak(text: Sample, cuts: int) -> tuple[float, tuple[str, str]] | None:
    """That of a copy in float64; None where it finds no room, does not run, or rounds on the way: then it tells no more."""
    try:
        exact = in_float64(text)
        with torch.autocast("cpu", enabled=False):
            found = _leak(exact, cuts)
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
    what = "gradients of losses before t that tokens from t on do not change"
    got = f"{worst[0]:.2g} of the largest in that of {worst[1]}"
    return _judged("causal_gradients", worst[0], LEAK, what, got, "correct the backward pass")


def loss_is_nats(text: Sample) -> list[Check]:
    """The training loss is the mean of the losses that are scored, -100 is not among them, and they are cross-entropies."""
    text.model.eval()
    nll = text.nll(text.ids, text.targets)
    with torch.no_grad():
        loss = text.model.losses(text.ids, text.targets)[0].double()
        some = text.targets.masked_fill(nll > nll.median(), IGNORE)  # the easier half: its mean is another
        part = text.model.losses(text.ids, some)[0].double()
        logits = None if getattr(text.model, "scores_itself", False) else text.model(text.ids).double()
    what, remedy = "loss to be the mean of nll", "return the mean over the targets that are scored, in nats, and nothing more"
    found = [_equal("loss_is_the_mean", loss, nll.mean(), what, remedy + _where(text, "loss"))]
    what = "loss where half of the targets are -100 to be the mean of nll of the others"
    remedy = "divide by the number of targets that are not -100"
    found += [_equal("ignores_minus_100", part, nll[some != IGNORE].mean(), what, remedy + _where(text, "loss"))]
    if logits is not None:
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.targets.flatten())
        what = "the mean of nll to be the cross-entropy of the logits"
        found += [_equal("nll_is_cross_entropy", nll.mean(), exact, what, "return nats, of unshifted targets")]
    return found


def distribution(text: Sample) -> Check:
    """Σ over the vocabulary of exp(-nll) is 1: so the losses are in nats, and a uniform model has ln V."""
    try:
        total = _total(text, 8)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        total = _total(text, text.ids.shape[1])  # any_length speaks of those that take no short text
    what = "the probabilities exp(-nll) of all tokens to sum to 1"
    remedy = f"compute nll by log_softmax over all V scores, in nats, not in bits{_where(text, 'nll')}"
    return _equal("distribution", torch.tensor(total), torch.tensor(1.0), what, remedy)


def _total(text: Sample, T: int) -> float:
    """The sum of the probabilities of all tokens after the first T."""
    V, total = text.model.config.vocab_size, 0.0
    rows = max(1, 2048 // T)
    for tokens in torch.arange(V, device=text.ids.device).split(rows):
        targets = torch.full((len(tokens), T), IGNORE, device=tokens.device)
        targets[:, -1] = tokens
        nll = text.nll(text.ids[:1, :T].expand(len(tokens), T).contiguous(), targets)
        total += (-nll[:, -1]).exp().sum().item()
    return total


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
    what = f"the loss with all parameters 0 to be ln V, V = {V}"
    remedy = f"return nats, not bits, and add no constant{_where(text, 'nll')}"
    return _equal("uniform_is_ln_v", nll.mean(), torch.tensor(math.log(V)), what, remedy)


def deterministic(text: Sample) -> Check:
    """Evaluated twice, and with its rows in another order, the model gives the same losses."""
    name, what = "deterministic", "the same losses again, in another order and one text at a time"
    if difference := _differs(text):
        remedy = f"keep nothing between calls, and draw nothing at random in eval(){_where(text)}"
        return _fails(name, f"expected the same losses again; got a change of {difference}; {remedy}")
    first = text.nll(text.ids, text.targets)
    turned = text.nll(text.ids.flip(0), text.targets.flip(0)).flip(0)
    apart = torch.cat([text.nll(text.ids[i : i + 1], text.targets[i : i + 1]) for i in range(2)])
    worst = max(_change(first, other) for other in (turned, apart))
    return _judged(
        name, worst, LEAK, what, f"a change of {worst:.2g} of the largest", f"score each row by itself{_where(text)}"
    )


def any_length(text: Sample) -> Check:
    """Shorter texts run, and their losses are those of the beginning of a longer one."""
    whole, T = text.nll(text.ids, text.targets), text.ids.shape[1]
    worst, at = 0.0, 0
    for length in dict.fromkeys((1, 7, T // 2 + 1)):
        try:
            part = text.nll(text.ids[:, :length].contiguous(), text.targets[:, :length].contiguous())
        except BaseException as error:
            pass_on(error)
            remedy = "fill short texts up inside forward, behind their end, and cut the output"
            return _fails(
                "any_length", f"expected losses of texts of any length; got {raised(error)} at T = {length}; {remedy}"
            )
        size = max(whole.abs().max().item(), 1e-12)
        change = (part - whole[:, :length]).abs().max().item() / size
        if not change <= worst:
            worst, at = change if change == change else math.inf, length
    what = "the losses of a text that ends earlier to be those of its beginning in a longer one"
    got = f"a change of {worst:.2g} of the largest at T = {at}"
    remedy = f"let no output depend on the length of the text{_where(text)}"
    return _judged("any_length", worst, NATS, what, got, remedy)


def precisions(text: Sample) -> Check:
    """A step in the autocast types of the device gives a finite loss that is near that of float32."""
    text.model.eval()
    device, worst = text.ids.device.type, 0.0
    exact = text.model.losses(text.ids, text.targets)[0].item()
    types = [torch.bfloat16] + [torch.float16] * (device == "cuda")
    for dtype in types:
        with torch.backends.cudnn.flags(enabled=False):  # as in _gradients
            with torch.autocast(device, dtype):
                loss = text.model.losses(text.ids, text.targets)[0]
            loss.backward()
        finite = all(torch.isfinite(p.grad).all() for p in text.model.parameters() if p.grad is not None)
        text.model.zero_grad(set_to_none=True)
        worst = max(worst, abs(loss.item() - exact) / abs(exact) if finite and math.isfinite(loss.item()) else math.inf)
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in types)
    got = f"a change of {worst:.2g}" if worst < math.inf else "a loss or a gradient that is not finite"
    what = f"a finite loss under autocast to {names}, near that of float32"
    return _judged("precisions", worst, 0.1, what, got, f"compute sums and exponentials in float32{_where(text)}")


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
    remedy = f"look for detach, for scores that are scaled down or large, and at the start of the weights{_where(text)}"
    learnt = _judged("learns", ratio, LEARNT, what, got, remedy)
    count, names_of = len(missed) + len(frozen), ", ".join((missed + frozen)[:5])
    got = f"{count} without: {names_of}" + (", ..." if count > 5 else "")
    remedy = "use them in forward, or remove them; make what is not learnt a buffer (register_buffer)"
    return [learnt, _judged("every_parameter_learns", count, 0, "a gradient of every parameter", got, remedy)]


def isolated(text: Sample) -> Check:
    """A fresh process builds the same model by its name, as the measurement of memory does."""
    outcome = run_isolated(parameters_of, text.model.config, timeout_s=CHILD_SECONDS)
    ours = sum(p.numel() for p in text.model.parameters())
    same = outcome.value == ours
    if same:
        detail = "parameters of the model in a fresh process"
        return Check(name="isolated", value=outcome.value, limit=ours, status="pass", detail=detail)
    got = outcome.message or f"{outcome.value:,}"
    remedy = "let the factory depend on its arguments alone"
    return _fails("isolated", f"expected a fresh process to build the same {ours:,} parameters; got {got}; {remedy}")


def parameters_of(config: ModelConfig) -> int:
    return sum(p.numel() for p in build(config).parameters())


def _runs_on_cpu(text: Sample) -> bool:
    try:
        output_type(Sample(copy.deepcopy(text.model).cpu(), text.ids.cpu(), text.targets.cpu()))
    except Exception:
        return False
    return True


def _cuts(T: int, count: int = CUTS) -> list[int]:
    """Where a text is changed: near its beginning and end, and between."""
    return sorted({max(1, min(T - 1, round(T * i / (count + 1)))) for i in range(1, count + 1)} | {1, T - 1})


def _changed(text: Sample, tokens: Tensor, t: int) -> Tensor:
    """Other tokens from position t on."""
    V = text.model.config.vocab_size
    return torch.where(torch.arange(tokens.shape[1], device=tokens.device) >= t, (tokens + 1 + V // 2) % V, tokens)


def _gradients(model: Trainable, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the sum of the scored losses, by parameter."""
    model.zero_grad(set_to_none=True)
    with torch.backends.cudnn.flags(enabled=False):  # whose RNNs have no backward in eval()
        (model.losses(ids, targets)[0] * (targets != IGNORE).sum()).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def _equal(name: str, got: Tensor, want: Tensor, expected: str, remedy: str) -> Check:
    relative = (got - want).abs().item() / max(abs(want.item()), 1e-12)
    return _judged(name, relative, NATS, f"{expected} ({want.item():.4f})", f"{got.item():.4f}", remedy)


def _judged(name: str, value: float, limit: float, expected: str, got: str, remedy: str) -> Check:
    """Pass if `value` is at most `limit`, and if not, one line with all three; no value that is not finite."""
    if value <= limit:
        return Check(name=name, value=value, limit=limit, status="pass", detail=expected)
    known = value if math.isfinite(value) else None
    return Check(name=name, value=known, limit=limit, status="fail", detail=f"expected {expected}; got {got}; {remedy}")


def _fails(name: str, detail: str) -> Check:
    return Check(name=name, value=None, limit=None, status="fail", detail=detail)


def _where(text: Sample, method: str = "") -> str:
    """Where in the user's module that method begins, or what scores: as " (file.py, line 3)"."""
    if not isinstance(text.model, OwnModel):  # a LanguageModel with a mixer of the user's
        return ""
    module = text.model.model
    if text.model.scores_itself:
        return defined(getattr(type(module), method or "nll"))
    return defined(type(module).forward)
