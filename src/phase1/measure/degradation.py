"""How much worse a trained model is than another: only where the two may be compared, with an interval, and the verdicts."""

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from phase1.measure.stats import Bounds, paired_ratio_interval
from phase1.record import Check, PerplexityResult

LIMIT_PERCENT = 5.0
LIMITS = {"ar_ssm_dense": 3.0, "equal_parameters": 0.0}  # percent, of variants with a claim of their own
GATE_LIMIT_PERCENT = 1.0


def compared(results: Mapping[str, PerplexityResult]) -> dict[str, PerplexityResult]:
    """The results with their degradation against the baseline of the same repetition, where the two may be compared."""
    return {key: _compared(key, result, results.get(baseline_of(key))) for key, result in results.items()}


def baseline_of(key: str) -> str:
    """The key of the baseline that `key` is compared with: the one of the same seed."""
    return "baseline" + repetition(key)[1]


def repetition(key: str) -> tuple[str, str]:
    """A key's plain part, and its `_seed…` or nothing."""
    plain, mark, seed = key.partition("_seed")
    return plain, mark + seed


def _compared(key: str, result: PerplexityResult, baseline: PerplexityResult | None) -> PerplexityResult:
    if key == baseline_of(key) or baseline is None or why_not_comparable(result, baseline):
        return result
    percent, interval = degradation(result, baseline)
    update = {"ppl_degradation_percent": percent, "degradation_ci95": interval}
    return result.model_copy(update=update | {"passes_5_percent_threshold": percent < LIMIT_PERCENT})


def degradation(result: PerplexityResult, reference: PerplexityResult) -> tuple[float, Bounds | None]:
    """100 (ppl / ppl of the reference - 1) and its interval over the windows of the text."""
    assert result.window_nll_nats and reference.window_nll_nats and reference.window_tokens
    return paired_ratio_interval(result.window_nll_nats, reference.window_nll_nats, reference.window_tokens)


def why_not_comparable(result: PerplexityResult, baseline: PerplexityResult | None) -> str:
    """Empty if a ratio of the two perplexities means something, else the reason."""
    if baseline is None:
        return "no baseline in this run"
    for side in (result, baseline):
        if side.status != "ok":
            return f"{side.model_name}: {side.detail}"
        if side.untrained:
            return f"{side.model_name} has not beaten the unigram entropy: train it on more tokens"
    for what in ("trained_tokens", "trained_on", "protocol_hash"):
        if getattr(result, what) != getattr(baseline, what):
            return f"{what} differ: {getattr(result, what)} and {getattr(baseline, what)}"
    return ""


def quality_checks(results: Mapping[str, PerplexityResult]) -> list[Check]:
    """Every model against its baseline, the means over seeds, and what the rank gate costs."""
    judged = [key for key in results if key != baseline_of(key) and repetition(key)[0] != "no_gate"]
    single = [_within(key, results[key], results.get(baseline_of(key))) for key in judged]
    plain = dict.fromkeys(repetition(key)[0] for key in judged)
    groups = {name: [key for key in judged if repetition(key)[0] == name] for name in plain}
    means = [_mean(name, [results[key] for key in keys]) for name, keys in groups.items() if len(keys) > 1]
    return [*single, *means, *_gate(results)]


def _within(key: str, result: PerplexityResult, baseline: PerplexityResult | None) -> Check:
    limit = LIMITS.get(repetition(key)[0], LIMIT_PERCENT)
    name = f"{key}_within_{limit:g}_percent"
    if reason := why_not_comparable(result, baseline):
        return Check(name=name, value=None, limit=limit, status="inconclusive", detail=reason)
    value = result.ppl_degradation_percent
    assert value is not None
    detail = f"percent above the baseline, {_interval(result.degradation_ci95)}, {result.trained_tokens:,} tokens each"
    return Check(name=name, value=value, limit=limit, status="pass" if value < limit else "fail", detail=detail)


def _interval(interval: Bounds | None) -> str:
    return "from one window: no interval" if interval is None else "95 % interval {:.2f} to {:.2f}".format(*interval)


def _mean(name: str, results: list[PerplexityResult]) -> Check:
    """The geometric mean of the ratios over seeds, with Student's interval: what is left when chance is averaged out."""
    limit = LIMITS.get(name, LIMIT_PERCENT)
    check: dict[str, Any] = {"name": f"{name}_mean_of_seeds_within_{limit:g}_percent", "limit": limit}
    percents = [r.ppl_degradation_percent for r in results if r.ppl_degradation_percent is not None]
    if len(percents) < len(results):
        detail = f"{len(results) - len(percents)} of {len(results)} seeds cannot be compared with their baseline"
        return Check(**check, value=None, status="inconclusive", detail=detail)
    logs = [math.log1p(percent / 100) for percent in percents]
    half = float(stdtrit(len(logs) - 1, 0.975)) * stdev(logs) / math.sqrt(len(logs))
    value, low, high = (100 * math.expm1(fmean(logs) + shift) for shift in (0.0, -half, half))
    over = f"geometric mean of {len(logs)} seeds, 95 % interval over seeds {low:.2f} to {high:.2f}"
    detail = f"percent above the baseline, {over}"
    return Check(**check, value=value, status="pass" if value < limit else "fail", detail=detail)


def _gate(results: Mapping[str, PerplexityResult]) -> list[Check]:
    """What the rank gate costs the engine of each `no_gate`, and whether it closes half of the ranks."""
    checks = []
    for key, ungated in results.items():
        plain, seed = repetition(key)
        if plain != "no_gate":
            continue
        max_rank = ungated.config["ar_ssm_max_rank"]
        engine = results.get(f"phase1_htt{ungated.config['htt_rank']}_ar{max_rank}{seed}")
        reason = "no such engine with a gate in this run" if engine is None else why_not_comparable(engine, ungated)
        cost, interval = (None, None) if engine is None or reason else degradation(engine, ungated)
        rank = None if engine is None or reason else engine.effective_rank
        detail = reason or f"percent above the engine with all ranks on, {_interval(interval)}"
        checks.append(_limited(f"gate_costs_at_most_1_percent{seed}", cost, GATE_LIMIT_PERCENT, detail))
        detail = reason or "mean over tokens of the sum of rank gates"
        checks.append(_limited(f"effective_rank_at_most_half{seed}", rank, max_rank / 2, detail))
    return checks


def _limited(name: str, value: float | None, limit: float, detail: str) -> Check:
    status: Any = "inconclusive" if value is None else "pass" if value <= limit else "fail"
    return Check(name=name, value=value, limit=limit, status=status, detail=detail)
