"""Is the engine's step time linear in the sequence length, and did the measurement pass its own controls?"""

from typing import Literal

from phase1.checks.controls import COPIES, a_a_check, control_check
from phase1.checks.limits import R_SQUARED_LIMIT
from phase1.records.schema import Check, ThroughputResult, Verdict
from phase1.stats.decoding import DECODE_SPEED_LIMIT
from phase1.stats.scaling import MIN_LENGTHS, deciding_lengths
from phase1.stats.step_times import UNSTABLE, spread

STATUS: dict[Verdict, Literal["pass", "fail", "inconclusive"]] = {
    "linear": "pass",
    "not linear": "fail",
    "inconclusive": "inconclusive",
}


def control_checks(results: dict[str, ThroughputResult]) -> list[Check]:
    """The checks of the measurement itself, of the controls that were measured."""
    copies = [(results[copy], results[original]) for copy, original in COPIES.items() if copy in results]
    found = [a_a_check(*pair) for pair in copies]
    return found + [control_check(results[role]) for role in ("quadratic_control",) if role in results]


def throughput_checks(engine: ThroughputResult) -> list[Check]:
    """The claims of the engine: its verdict is linear, and a straight line explains its times."""
    fit = engine.scaling
    if fit is None:
        detail = f"the engine was measured at no length ({engine.status}: {engine.detail})"
        return [Check.undecided("scaling_linear", detail), Check.undecided("r_squared", detail, R_SQUARED_LIMIT)]
    status = STATUS[fit.verdict]
    detail = f"exponent of the step time in T; {fit.verdict}{': ' if fit.detail else ''}{fit.detail}"
    linear = Check(name="scaling_linear", value=fit.exponent, limit=None, status=status, detail=detail)
    return [linear, _r_squared(engine)]


def decoding_checks(results: dict[str, ThroughputResult]) -> list[Check]:
    """Generation costs the same after any context: the engine's does, and the Transformer's is found not to."""
    found = {role: result.decoding for role, result in results.items() if result.decoding is not None}
    engine, control = found.get("phase1"), found.get("baseline")
    if engine is None:
        return []
    status = {"constant": "pass", "not constant": "fail", "inconclusive": "inconclusive"}[engine.verdict]
    detail = f"tokens/s after the longest context over those after the shortest; {engine.verdict}"
    detail += f": {engine.detail}" if engine.detail else ""
    if status == "pass" and (control is None or control.verdict != "not constant"):
        status, seen = "inconclusive", "was not measured" if control is None else f"was found {control.verdict}"
        detail += f", but the Transformer, whose state grows, {seen}: give longer --decode-contexts"
    values = {"name": "decode_constant", "value": engine.speed_ratio, "limit": DECODE_SPEED_LIMIT}
    return [Check.model_validate(values | {"status": status, "detail": detail})]


def _r_squared(engine: ThroughputResult) -> Check:
    """The check of R²; undecided over too few lengths, or if it fails because the times of single lengths scatter."""
    name, limit, fit = "r_squared", R_SQUARED_LIMIT, engine.scaling
    assert fit is not None
    done = [m for m in engine.measurements if m.status == "ok"]
    if fit.r_squared is None or len(done) < MIN_LENGTHS:  # a line through two points explains everything
        more = deciding_lengths([m.seq_length for m in done])
        detail = f"a line needs {MIN_LENGTHS} lengths to be tested; got {len(done)}: {more}"
        return Check.undecided(name, detail, limit, fit.r_squared)
    noisy = [f"{m.seq_length:,}" for m in done if spread(m.step_times_ms) > UNSTABLE]
    if fit.r_squared <= limit and fit.verdict == "inconclusive" and noisy:
        detail = f"the steps of T = {', '.join(noisy)} scatter too much: measure on an idle machine, or raise --measure-steps"
        return Check.undecided(name, detail, limit, fit.r_squared)
    detail = "of t = a + b T; necessary, not sufficient: T^2 over 512 to 4096 reaches 0.962"
    return Check.above(name, fit.r_squared, limit, detail)
