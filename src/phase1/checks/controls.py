"""Checks of the measurement itself: it must find no difference between copies, and a quadratic model not linear."""

from typing import Literal

from phase1.records.schema import Check, ThroughputResult
from phase1.stats.step_times import MIN_ROUNDS, reaches, rounds_of, speed_ratio

COPIES = {"baseline_again": "baseline", "engine_again": "phase1"}  # second copy: first
FALSE_ALARMS = 0.05  # rate of false alarms of the whole check, over all lengths
A_A, CONTROL = "a_a_no_difference", "control_rejected"
_QUIETER = "stop other programs, lock the clock, raise --warmup-steps and --measure-steps, and measure again"
_SMALLER = "give a smaller --batch-size or shorter --seq-lengths"


def a_a_check(copy: ThroughputResult, original: ThroughputResult) -> Check:
    """Does the speed ratio of two copies of one model contain 1 at every length?

    Each of k lengths has an interval of level 1 - 0.05/k (Bonferroni), so that equal copies fail in at most 5 % of runs. The
    value is the largest distance of a ratio from 1, in percent.
    """
    pairs = {m.seq_length: rounds_of(m, original.measurements) for m in copy.measurements}
    found = {length: pair for length, pair in pairs.items() if pair}
    if not found:
        return _check(A_A, None, "inconclusive", "no length was measured for both copies; see the failures above")
    level, rounds = 1 - FALSE_ALARMS / len(found), min(len(times) for times, _ in found.values())
    if not reaches(level, rounds):
        needed = next(n for n in range(MIN_ROUNDS, 100) if reaches(level, n))
        detail = f"{rounds} rounds cannot decide {len(found)} lengths; give --measure-steps {needed} or more"
        return _check(A_A, None, "inconclusive", detail)
    ratios = {length: speed_ratio(*pair, level) for length, pair in found.items()}
    value = max(100 * abs(ratio - 1) for ratio, _ in ratios.values())
    bounds = {length: interval for length, (_, interval) in ratios.items() if interval is not None}
    wrong = [f"{low:.3f} to {high:.3f} at T = {length:,}" for length, (low, high) in bounds.items() if not low <= 1 <= high]
    if wrong:
        detail = (
            f"percent; two copies of one model differ ({'; '.join(wrong)}), so other ratios of this run mean less: {_QUIETER}"
        )
        return _check(A_A, value, "fail", detail)
    visible = max(100 * max(high - 1, 1 - low) for low, high in bounds.values())
    detail = f"percent; 1 is within every interval of level {level:.2%}; differences above {visible:.3g} % are excluded"
    return _check(A_A, value, "pass", detail)


def control_check(control: ThroughputResult) -> Check:
    """Is the quadratic control found not linear, by the rule that judges the engine?"""
    fit = control.scaling
    if fit is None:
        return _check(CONTROL, None, "inconclusive", f"the control was measured at no length ({control.detail}); {_SMALLER}")
    lengths = [m.seq_length for m in control.measurements if m.status == "ok"]
    failed = len(control.measurements) - len(lengths)
    upto = f"lengths up to {max(lengths):,}{f', {failed} longer failed' if failed else ''}"
    if fit.verdict == "not linear":
        return _check(CONTROL, fit.exponent, "pass", f"exponent; not linear, as it should be ({upto}): {fit.detail}")
    worth = "an engine that these lengths call linear is not thereby told from a quadratic one"
    if fit.verdict == "linear":
        detail = f"a quadratic model was called linear ({upto}): {worth}; add longer lengths"
        return _check(CONTROL, fit.exponent, "fail", detail)
    return _check(CONTROL, fit.exponent, "inconclusive", f"undecided ({upto}): {fit.detail}; {worth}")


def _check(name: str, value: float | None, status: Literal["pass", "fail", "inconclusive"], detail: str) -> Check:
    return Check(name=name, value=value, limit=None, status=status, detail=detail)
