"""Verdicts on quality: how much worse a trained model is than another, with an interval, if the two may be compared."""

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean, stdev

from scipy.special import stdtrit

from phase1.checks.limits import DEGRADATION_LIMIT, GATE_LIMIT, VARIANT_LIMITS
from phase1.records.schema import Check, PerplexityResult
from phase1.roster import VARIANTS, Key
from phase1.stats import Bounds
from phase1.stats.perplexity_ratio import paired_ratio_interval

_UNGATED = "the engine with all ranks on"
UNJUDGED = ("baseline", *(name for name, entry in VARIANTS.items() if not entry.judged))
"""Reference models: reported, never judged."""


def compared(results: Mapping[str, PerplexityResult], seq_length: int) -> dict[str, PerplexityResult]:
    """The results, scored at T = `seq_length`, with their degradation against the baseline of the same seed.

    The degradation is left out if the two may not be compared, and the verdict if the ratio cannot decide it.
    """
    return {key: _compared(key, result, results.get(baseline_of(key)), seq_length) for key, result in results.items()}


def baseline_of(key: str) -> str:
    """The key of the baseline that `key` is compared with: the one of the same seed."""
    return str(Key.parse(key).baseline)


def _compared(key: str, result: PerplexityResult, baseline: PerplexityResult | None, seq_length: int) -> PerplexityResult:
    if key == baseline_of(key) or baseline is None or why_not_comparable(result, baseline):
        return result
    percent, interval = degradation(result, baseline)
    passes = None if why_no_verdict(baseline, seq_length) else percent < DEGRADATION_LIMIT
    update = {"ppl_degradation_percent": percent, "degradation_ci95": interval, "passes_5_percent_threshold": passes}
    return result.model_copy(update=update)


def degradation(result: PerplexityResult, reference: PerplexityResult) -> tuple[float, Bounds | None]:
    """100 (ppl / ppl of the reference - 1) and its interval over the windows of the text."""
    assert result.window_nll_nats and reference.window_nll_nats and reference.window_tokens
    return paired_ratio_interval(result.window_nll_nats, reference.window_nll_nats, reference.window_tokens)


def why_not_comparable(result: PerplexityResult, baseline: PerplexityResult | None) -> str:
    """Empty if a ratio of the two perplexities means something, else the reason."""
    for side in (result, baseline):
        if side is None:
            return "no baseline in this run"
        if side.status != "ok":
            return f"{side.model_name}: {side.detail}"
        if side.untrained:
            return f"{side.model_name} has not beaten the unigram entropy: train it on more tokens"
    assert baseline is not None
    for what in ("trained_tokens", "trained_on", "trained_seq_length", "protocol_hash"):
        if getattr(result, what) != getattr(baseline, what):
            return f"{what} differ: {getattr(result, what)} and {getattr(baseline, what)}"
    return ""


def why_no_verdict(baseline: PerplexityResult, seq_length: int) -> str:
    """Empty, or why a ratio to `baseline` decides nothing: beyond its training length a Transformer breaks down."""
    trained = baseline.trained_seq_length
    if trained is None or seq_length <= trained:
        return ""
    return f"scored at T = {seq_length:,}, trained at T = {trained:,}: a verdict needs T of the training, or less"


def quality_checks(results: Mapping[str, PerplexityResult], seq_length: int) -> list[Check]:
    """Every model against its baseline, the means over seeds, and what the rank gate costs."""
    unsound = [key for key in results if Key.parse(key).model in UNJUDGED and results[key].unsound]
    judged = [key for key in results if Key.parse(key).model not in UNJUDGED]
    single = {key: _within(key, results[key], results.get(baseline_of(key)), seq_length) for key in judged}
    means = []
    for name in dict.fromkeys(Key.parse(key).model for key in judged):
        seeds = [check for key, check in single.items() if Key.parse(key).model == name]
        means += _mean(f"{name}_mean_of_seeds_within_{seeds[0].limit:g}_percent", seeds, "the baseline")
    faults = [_unsound(f"{key}_may_be_scored", results[key].unsound, None) for key in unsound]
    return [*faults, *single.values(), *means, *_gate(results)]


def _unsound(name: str, why: str, limit: float | None) -> Check:
    return Check(name=name, value=None, limit=limit, status="fail", detail=why)


def _within(key: str, result: PerplexityResult, baseline: PerplexityResult | None, seq_length: int) -> Check:
    limit = VARIANT_LIMITS.get(Key.parse(key).model, DEGRADATION_LIMIT)
    name = f"{key}_within_{limit:g}_percent"
    if result.unsound:
        return _unsound(name, result.unsound, limit)
    reason, value = why_not_comparable(result, baseline), result.ppl_degradation_percent
    if not reason and baseline is not None:
        reason = why_no_verdict(baseline, seq_length)
    if reason or value is None:
        return Check.undecided(name, reason, limit, value)
    detail = f"percent above the baseline, {_interval(result.degradation_ci95)}, {result.trained_tokens:,} tokens each"
    return Check.below(name, value, limit, detail)


def _interval(interval: Bounds | None) -> str:
    return "from one window: no interval" if interval is None else "95 % interval {:.2f} to {:.2f}".format(*interval)


def _mean(name: str, seeds: list[Check], reference: str) -> list[Check]:
    """The geometric mean of the ratios over seeds, with Student's interval; no check if there are fewer than two seeds."""
    if len(seeds) < 2:
        return []
    limit = seeds[0].limit
    assert limit is not None
    undecided = sum(check.status == "inconclusive" or check.value is None for check in seeds)
    if undecided:
        detail = f"{undecided} of {len(seeds)} seeds have no verdict"
        return [Check.undecided(name, detail, limit)]
    logs = [math.log1p(check.value / 100) for check in seeds if check.value is not None]
    half = float(stdtrit(len(logs) - 1, 0.975)) * stdev(logs) / math.sqrt(len(logs))
    value, low, high = (100 * math.expm1(fmean(logs) + shift) for shift in (0.0, -half, half))
    detail = f"percent above {reference}, geometric mean of {len(logs)} seeds, 95 % interval over seeds {low:.2f} to {high:.2f}"
    return [Check.below(name, value, limit, detail)]


def _gate(results: Mapping[str, PerplexityResult]) -> list[Check]:
    """What the rank gate costs the engine of each `no_gate`, over seeds too, and whether it closes half of the ranks."""
    costs, ranks = [], []
    for text, ungated in results.items():
        key = Key.parse(text)
        if key.name != "no_gate":
            continue
        max_rank = ungated.config["ar_ssm_max_rank"]
        engine = results.get(str(Key("phase1", ungated.config["htt_rank"], max_rank, key.seed)))
        reason = "no such engine with a gate in this run" if engine is None else why_not_comparable(engine, ungated)
        cost, interval = (None, None) if engine is None or reason else degradation(engine, ungated)
        rank = None if engine is None or reason else engine.effective_rank
        detail = reason or f"percent above {_UNGATED}, {_interval(interval)}"
        costs.append(Check.at_most(str(replace(key, name="gate_costs_at_most_1_percent")), cost, GATE_LIMIT, detail))
        detail = reason or "mean over tokens of the sum of rank gates"
        ranks.append(Check.at_most(str(replace(key, name="effective_rank_at_most_half")), rank, max_rank / 2, detail))
    return [*costs, *_mean("gate_costs_mean_of_seeds_within_1_percent", costs, _UNGATED), *ranks]
