"""Whether losses are those of a distribution, in nats, and the same again, at every length and in every precision."""

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from phase1.errors import is_out_of_memory
from phase1.measure.soundness.sample import (
    LEAK,
    NATS,
    Sample,
    differs,
    equal,
    fails,
    in_float64,
    judged,
    relative_change,
    where,
)
from phase1.measure.workload import SEED
from phase1.ops.cross_entropy import IGNORE
from phase1.records.schema import Check
from phase1.trainable import pass_on, raised

T = TypeVar("T")

SHORT = 16  # every text up to this length is tried
ADDED = 1e-5  # relative, of losses that must be equal in float64; float32 inside rounds to a hundredth, z-loss adds 1e-3
SPREAD = 0.02  # by which weights are moved there: label smoothing changes nothing of equal probabilities, as of a head of zeros
FEW = 8192  # tokens of a vocabulary whose probabilities are summed in float64 too, on the CPU


def loss_is_nats(text: Sample) -> list[Check]:
    """The training loss is the mean of the losses that are scored, -100 is not among them, and they are cross-entropies.

    As the model runs, and then in float64, where what a loss may have more shows: label smoothing of a new model changes less
    than FP16 rounds.
    """
    found = _of_loss(text, NATS)
    exactly = _exactly(text, lambda exact: _of_loss(exact, ADDED)) or found
    return [one if one.status == "fail" else other for one, other in zip(found, exactly, strict=True)]


def _exactly(text: Sample, check: Callable[[Sample], T]) -> T | None:
    """What `check` finds of a copy in float64 with moved weights; None where it does not run there: then it tells no more."""
    try:
        exact = in_float64(text)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.manual_seed(SEED)
            for parameter in exact.model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(SPREAD * torch.randn_like(parameter))
            nll = exact.model.eval().nll(exact.ids, exact.targets)[0]
            exact_enough = nll.dtype in (torch.float32, torch.float64) and bool(torch.isfinite(nll).all())
            return check(exact) if exact_enough else None
    except Exception:
        return None


def _of_loss(text: Sample, limit: float) -> list[Check]:
    text.model.eval()
    nll = text.nll(text.ids, text.targets)
    with torch.no_grad():
        loss = text.model.losses(text.ids, text.targets)[0].double()
        some = text.targets.masked_fill(nll > nll.median(), IGNORE)  # the easier half: its mean is another
        part = text.model.losses(text.ids, some)[0].double()
        logits = None if getattr(text.model, "scores_itself", False) else text.model(text.ids).double()
    what, remedy = (
        "loss to be the mean of nll",
        "return the mean over the scored targets, in nats, without label smoothing, z-loss or more",
    )
    found = [equal("loss_is_the_mean", loss, nll.mean(), what, remedy + where(text, "loss"), limit)]
    what = "loss where half of the targets are -100 to be the mean of nll of the others"
    remedy = "divide by the number of targets that are not -100"
    found += [equal("ignores_minus_100", part, nll[some != IGNORE].mean(), what, remedy + where(text, "loss"), limit)]
    if logits is not None:
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.targets.flatten())
        what = "the mean of nll to be the cross-entropy of the logits"
        found += [equal("nll_is_cross_entropy", nll.mean(), exact, what, "return nats, of unshifted targets", limit)]
    return found


def distribution(text: Sample) -> Check:
    """Σ over the vocabulary of exp(-nll) is 1: so the losses are in nats, and a uniform model has ln V.

    In float64 too, as `loss_is_nats` is.
    """
    try:
        total = _total(text, 8)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        total = _total(text, text.ids.shape[1])  # any_length speaks of those that take no short text
    found = _sums_to_one(text, total, NATS)
    if found.status == "fail" or text.model.config.vocab_size > FEW:
        return found
    return _exactly(text, lambda exact: _sums_to_one(exact, _total(exact, 1), ADDED)) or found


def _sums_to_one(text: Sample, total: float, limit: float) -> Check:
    what = "the probabilities exp(-nll) of all tokens to sum to 1"
    remedy = f"compute nll by log_softmax over all V scores, in nats, not in bits, and add nothing{where(text, 'nll')}"
    return equal("distribution", torch.tensor(total), torch.tensor(1.0), what, remedy, limit)


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
    remedy = f"return nats, not bits, and add no constant{where(text, 'nll')}"
    return equal("uniform_is_ln_v", nll.mean(), torch.tensor(math.log(V)), what, remedy)


def deterministic(text: Sample) -> Check:
    """Evaluated twice, and with its rows in another order, the model gives the same losses."""
    name, what = "deterministic", "the same losses again, in another order and one text at a time"
    if difference := differs(text):
        remedy = f"keep nothing between calls, and draw nothing at random in eval(){where(text)}"
        return fails(name, f"expected the same losses again; got a change of {difference}; {remedy}")
    first = text.nll(text.ids, text.targets)
    turned = text.nll(text.ids.flip(0), text.targets.flip(0)).flip(0)
    apart = torch.cat([text.nll(text.ids[i : i + 1], text.targets[i : i + 1]) for i in range(2)])
    worst = max(relative_change(first, other) for other in (turned, apart))
    return judged(name, worst, LEAK, what, f"a change of {worst:.2g} of the largest", f"score each row by itself{where(text)}")


def any_length(text: Sample) -> Check:
    """Shorter texts run, and their losses are those of the beginning of a longer one."""
    whole, T = text.nll(text.ids, text.targets), text.ids.shape[1]
    worst, at = 0.0, 0
    for length in sorted({*range(1, min(T, SHORT) + 1), T // 2, T // 2 + 1, max(1, T - 1)} - {0}):
        try:
            part = text.nll(text.ids[:, :length].contiguous(), text.targets[:, :length].contiguous())
        except BaseException as error:
            pass_on(error)
            remedy = "fill short texts up inside forward, behind their end, and cut the output"
            return fails("any_length", f"expected losses of texts of any length; got {raised(error)} at T = {length}; {remedy}")
        size = max(whole.abs().max().item(), 1e-12)
        change = (part - whole[:, :length]).abs().max().item() / size
        if not change <= worst:
            worst, at = change if change == change else math.inf, length
    what = "the losses of a text that ends earlier to be those of its beginning in a longer one"
    got = f"a change of {worst:.2g} of the largest at T = {at}"
    remedy = f"let no output depend on the length of the text{where(text)}"
    return judged("any_length", worst, NATS, what, got, remedy)


def precisions(text: Sample) -> Check:
    """A step in the autocast types of the device gives a finite loss that is near that of float32."""
    text.model.eval()
    device, worst = text.ids.device.type, 0.0
    exact = text.model.losses(text.ids, text.targets)[0].item()
    types = [torch.bfloat16] + [torch.float16] * (device == "cuda")
    for dtype in types:
        with torch.backends.cudnn.flags(enabled=False):  # whose RNNs have no backward in eval()
            with torch.autocast(device, dtype):
                loss = text.model.losses(text.ids, text.targets)[0]
            loss.backward()
        finite = all(torch.isfinite(p.grad).all() for p in text.model.parameters() if p.grad is not None)
        text.model.zero_grad(set_to_none=True)
        worst = max(worst, abs(loss.item() - exact) / abs(exact) if finite and math.isfinite(loss.item()) else math.inf)
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in types)
    got = f"a change of {worst:.2g}" if worst < math.inf else "a loss or a gradient that is not finite"
    what = f"a finite loss under autocast to {names}, near that of float32"
    return judged("precisions", worst, 0.1, what, got, f"compute sums and exponentials in float32{where(text)}")
