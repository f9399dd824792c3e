"""Whether a loss, or its gradient, sees later tokens than it may: evaluated, trained, and of a long text."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from phase1.errors import is_out_of_memory
from phase1.measure.soundness.sample import EXACT_LEAK, LEAK, Sample, differs, in_float64, judged, runs_on_cpu, sample_of
from phase1.ops.cross_entropy import IGNORE
from phase1.records.schema import Check
from phase1.trainable import Trainable, raised

CUTS = 8  # positions at which both texts are changed
FEW_CUTS = 2  # of a long text
EVERY = 512  # T up to which the text is changed at every position, above it at the ends of chunks alone
ROWS, TOKENS, SCORES = 64, 2**14, 2**25  # at most, of one forward in which each row is changed at a position of its own
LONG = (320, 256, 192, 128)  # T of the second check of causality, the first that the model takes: above chunks and windows
MASK = "mask the future"
FINITE = "give every token a finite logit, and look for log and division by 0"


def causal_outputs(text: Sample, name: str = "causal", cuts: int = CUTS, every: int = EVERY) -> Check:
    """Changing all inputs from position t on, or all targets, changes no loss before that of position t.

    As the model runs, and then in float64 on the CPU, where rounding hides no small leak. Every t of a text of at most
    `every` is tried, of a longer one those where chunks end: of a model on the CPU in float64 alone, where that tells.
    """
    (worst, seen), limit, where = _leak(text, _cuts(text.ids.shape[1], cuts)), _rounding(text), ""
    exact = _exact_leak(text, cuts, every) if worst <= limit else None
    if worst <= limit and (exact is None or text.ids.is_cuda):
        worst, seen = max((worst, seen), _leak_anywhere(text, every))
    if worst <= limit and exact is not None:
        (worst, seen), limit, where = exact, EXACT_LEAK, " in float64"
    return _causal(name, worst, limit, seen, where + (" in train() mode" if text.training else ""))


def _rounding(text: Sample) -> float:
    """The largest leak that may be rounding: half precision rounds more."""
    return 10 * LEAK if torch.is_autocast_enabled(text.ids.device.type) else LEAK


def _causal(name: str, worst: float, limit: float, seen: tuple[str, str], where: str) -> Check:
    got = f"{seen[0]} ({worst:.2g} x the change of later ones)" if math.isfinite(worst) else "losses that are not finite"
    remedy = seen[1] if math.isfinite(worst) else FINITE
    return judged(name, worst, limit, f"no loss{where} to change when a later token does", got, remedy)


def causal_in_training(text: Sample) -> Check:
    """The same of a copy in train() mode: dropout and noise are those of one state of the random generator."""
    name = "causal_in_training"
    copied = text._replace(model=copy.deepcopy(text.model), training=True)
    if difference := differs(copied):
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
            probe = in_float64(longer) if longer.ids.is_cuda and runs_on_cpu(text) else longer
            probe.nll(probe.ids, probe.targets)  # on the CPU: an index too large is the end of all work on a GPU
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = why or f": T = {length} gives {raised(error)}"
            continue
        check = causal_outputs(longer, name, FEW_CUTS)
        trained = longer._replace(model=copy.deepcopy(text.model), training=True)
        if check.status == "pass" and not differs(trained):
            check = causal_outputs(trained, name, FEW_CUTS, every=0)  # `causal_in_training` tried them all
        return check.model_copy(update={"detail": f"T = {length}: {check.detail}"})
    if not why:
        return Check(name=name, value=None, limit=None, status="pass", detail=f"T = {T}: as above")
    return Check.undecided(name, f"causal up to T = {T} only{why}")


def causal_up_to(checks: Iterable[Check]) -> int | None:
    """The length of the longest text that was found causal, of all checks of a model; None if `causal` tells."""
    found = next((check for check in checks if check.name == "causal_at_length" and check.status == "pass"), None)
    return int(found.detail.removeprefix("T = ").partition(":")[0]) if found else None


def causal_if_it_fits(text: Sample) -> list[Check]:
    """The check at the length of the score, as the model runs, where there is room for all logits of it."""
    try:
        worst, seen = _leak(text, _cuts(text.ids.shape[1], FEW_CUTS))
        if worst <= _rounding(text):
            worst, seen = max((worst, seen), _leak_anywhere(text))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return []
    return [_causal("causal", worst, _rounding(text), seen, f" at T = {text.ids.shape[1]:,}")]


def _leak(text: Sample, cuts: Iterable[int]) -> tuple[float, tuple[str, str]]:
    """The largest change of an earlier loss over that of a later one, who sees what, and what to do about it."""
    worst, seen, before = 0.0, ("", ""), text.nll(text.ids, text.targets)
    for t in cuts:
        for what, remedy, ids, targets in (
            (f"sees token {t} or later", MASK, _changed(text, text.ids, t), text.targets),
            (f"scores target {t} or later", "targets are shifted already", text.ids, _changed(text, text.targets, t)),
        ):
            change = (text.nll(ids, targets) - before).abs()
            leak = change[:, :t].max().item() / max(change[:, t:].max().item(), 1e-12)
            if not change.isfinite().all():
                leak = math.inf
            if leak > worst:
                worst, seen = leak, (f"a position before {t} that {what}", remedy)
    return worst, seen


def _leak_anywhere(text: Sample, every: int = EVERY) -> tuple[float, tuple[str, str]]:
    """That at the one position, of all that are tried, where it is the largest."""
    suspect = _suspect(text, _positions(text.ids.shape[1], every))
    return (0.0, ("", "")) if suspect is None else _leak(text, [suspect])


def _suspect(text: Sample, cuts: list[int]) -> int | None:
    """The cut with the largest leak, of one text in many rows, each changed from a cut of its own on; None without any.

    A suspicion alone, as a model that mixes rows gives one too: `_leak` changes all rows at one position.
    """
    if not cuts:
        return None
    T, V = text.ids.shape[1], text.model.config.vocab_size
    rows = max(1, min(ROWS, TOKENS // T, SCORES // (T * V), len(cuts)))
    ids, targets = (x[:1].expand(rows, T).contiguous() for x in (text.ids, text.targets))
    before = text.nll(ids, targets)  # in as many rows, which have the same dropout then
    worst, suspect = 0.0, None
    for first in range(0, len(cuts), rows):
        some = cuts[first : first + rows]
        at = torch.tensor(some + some[-1:] * (rows - len(some)), device=ids.device)[:, None]
        change = (text.nll(_changed(text, ids, at), _changed(text, targets, at)) - before).abs()
        later = torch.arange(T, device=ids.device) >= at
        leaks = change.masked_fill(later, 0).amax(1) / change.masked_fill(~later, 0).amax(1).clamp(min=1e-12)
        leaks = leaks.masked_fill(~change.isfinite().all(1), math.inf)
        leak, row = leaks.max(0)
        if leak.item() > worst:
            worst, suspect = leak.item(), int(at[row].item())
    return suspect


def _exact_leak(text: Sample, cuts: int, every: int) -> tuple[float, tuple[str, str]] | None:
    """That of a copy in float64; None where it finds no room, does not run, or rounds on the way: then it tells no more."""
    try:
        exact = in_float64(text)
        with torch.autocast("cpu", enabled=False):
            with _Roundings() as roundings:
                exact.nll(exact.ids, exact.targets)
            if roundings.any:
                return None
            found = _leak(exact, _cuts(text.ids.shape[1], cuts))
            return max(found, _leak_anywhere(exact, every)) if found[0] <= EXACT_LEAK else found
    except Exception:
        return None


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
    return judged("causal_gradients", worst[0], LEAK, what, got, "correct the backward pass")


def _gradients(model: Trainable, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the sum of the scored losses, by parameter."""
    model.zero_grad(set_to_none=True)
    with torch.backends.cudnn.flags(enabled=False):  # whose RNNs have no backward in eval()
        (model.losses(ids, targets)[0] * (targets != IGNORE).sum()).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def _cuts(T: int, count: int = CUTS) -> list[int]:
    """Where a text is changed: near its beginning and end, and between."""
    return sorted({max(1, min(T - 1, round(T * i / (count + 1)))) for i in range(1, count + 1)} | {1, T - 1})


def _positions(T: int, every: int = EVERY) -> list[int]:
    """Every position of a text of at most `every`; of a longer one the first end of chunks of each usual size.

    Those are 2^k, 3 x 2^k, 5 x 2^k and 25 x 2^k (8, 10, 12, 16, 24, 25, 48, 64, 100, 128, ...), with both neighbours.
    """
    if every >= T:
        return list(range(1, T))
    sizes = {factor << k for factor in (1, 3, 5, 25) for k in range(T.bit_length())}
    return sorted({t for size in sizes for t in (size - 1, size, size + 1) if 0 < t < T})


def _changed(text: Sample, tokens: Tensor, t: int | Tensor) -> Tensor:
    """Other tokens from position t on, which may be one for each row."""
    V = text.model.config.vocab_size
    other = (tokens + 1 + V // 2 % max(1, V - 1)) % V  # of two tokens too
    return torch.where(torch.arange(tokens.shape[1], device=tokens.device) >= t, other, tokens)
