"""Two runs number by number: what may be compared, by how much it changed, and which rules it breaks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from phase1.records.schema import MemoryResult, PerplexityResult, Report, Status, ThroughputResult
from phase1.roster import CONTROLS

Outcome = Literal["PASS", "FAIL", "n/a"]
METRICS = {"peak": "memory", "tokens_per_second": "throughput", "perplexity": "perplexity"}
"""The kind of report that holds each metric: peak_allocated_bytes of a memory report, and the fields of that name."""
_RULE = re.compile(r"([a-z_]{1,40}):([+-])([0-9]{1,4}(?:\.[0-9]{1,2})?)%")
_MAY_BE_UNKNOWN = ("precision", "trained_on")  # not in every report, and then equal only to its like
_UNKNOWN_ON_FAILURE = ("protocol_hash", "trained_tokens", "trained_on")
SETTINGS = 3  # of a model that differ, which a reason names
Key = tuple[str, str, int | None]  # model, metric, seq_length


@dataclass(frozen=True)
class Rule:
    """NAME:+X% is broken by a new value more than X % above the old one, NAME:-X% by one more than X % below it."""

    metric: str
    percent: Fraction  # signed

    def broken(self, old: float, new: float) -> bool:
        """Whether `new` is past the limit, by exact arithmetic: no rounding at the limit, no division by an old 0."""
        limit = Fraction(old) * (1 + self.percent / 100)
        return Fraction(new) > limit if self.percent >= 0 else Fraction(new) < limit

    @property
    def limit(self) -> str:
        return f"{float(self.percent):+g}%"

    def __str__(self) -> str:
        return f"{self.metric}:{self.limit}"


@dataclass(frozen=True)
class Number:
    """A value of one report (None where the model failed), the conditions it holds under, and the settings of the model."""

    value: float | None
    status: Status
    conditions: Mapping[str, object]
    config: Mapping[str, object]
    detail: str = ""


@dataclass(frozen=True)
class Difference:
    """One metric of one model at one length in both runs; `reason` says why the two cannot be compared, if so."""

    model: str
    metric: str
    seq_length: int | None
    old: float | None
    new: float | None
    reason: str = ""
    lost: bool = False  # OLD has a number, and under the same conditions NEW failed

    @property
    def change_percent(self) -> float | None:
        """100 (new / old - 1); None where there is no such number."""
        if self.reason or not self.old or self.new is None:
            return None
        change = 100 * (Fraction(self.new) / Fraction(self.old) - 1)
        return float(change) if change < 10**15 else None

    def outcome(self, rule: Rule) -> Outcome:
        """FAIL too where the new run has lost the number, for example to a lack of memory."""
        if self.lost:
            return "FAIL"
        if self.reason or self.old is None or self.new is None:
            return "n/a"
        return "FAIL" if rule.broken(self.old, self.new) else "PASS"


def parse_rules(text: str) -> list[Rule]:
    """The rules of 'peak:+2%,tokens_per_second:-5%'. Raises ValueError, one line, for anything else."""
    rules: list[Rule] = []
    for part in (item.strip() for item in text.split(",")):
        match = _RULE.fullmatch(part)
        if not match:
            raise ValueError(f"--fail-on must be NAME:+X% or NAME:-X%, separated by commas; got {part!r:.80}; try peak:+2%")
        metric, sign, size = match.groups()
        if metric not in METRICS:
            raise ValueError(f"--fail-on must name one of {', '.join(METRICS)}; got {metric!r}; try peak:+2%")
        percent = Fraction(sign + size)
        if sign == "-" and not 0 < -percent < 100:
            raise ValueError(f"--fail-on NAME:-X% must have X between 0 and 100; got {part!r:.80}; try {metric}:-5%")
        if any(rule.metric == metric and (rule.percent < 0) == (percent < 0) for rule in rules):
            raise ValueError(f"--fail-on must have one limit per metric and direction; got {part!r:.80} too; remove one")
        rules.append(Rule(metric, percent))
    return rules


def differences(old: Mapping[str, Report[Any]], new: Mapping[str, Report[Any]]) -> list[Difference]:
    """Every number that is in either run, matched by model, metric and length. Reports are given by kind.

    Raises ValueError where a model has two measurements at one length.
    """
    before, after = _numbers(old), _numbers(new)
    return [_difference(key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])]


def _difference(key: Key, old: Number | None, new: Number | None) -> Difference:
    if old is None or new is None:
        values = (old.value if old else None, new.value if new else None)
        return Difference(*key, *values, reason=f"not in {'OLD' if old is None else 'NEW'}")
    reason = _mismatch(old, new)
    if not reason and old.status != "ok":
        reason = f"OLD failed ({old.status}: {old.detail})"
    elif not reason and new.status != "ok":
        return Difference(*key, old.value, None, reason=f"NEW failed ({new.status}: {new.detail})", lost=True)
    elif not reason and any(value is None or value < 0 for value in (old.value, new.value)):
        reason = "a value is missing or negative"
    return Difference(*key, old.value, new.value, reason=reason)


def _mismatch(old: Number, new: Number) -> str:
    """The first condition that differs or that a file does not record; a failed model may lack some."""
    failed = (old.status, new.status) != ("ok", "ok")
    for name, before in old.conditions.items():
        after = new.conditions[name]
        if failed and name in _UNKNOWN_ON_FAILURE and None in (before, after):
            continue
        if before != after:
            if name == "config_id" and (settings := _changed_settings(old.config, new.config)):
                return settings
            return f"{name} is {_shown(before)} in OLD and {_shown(after)} in NEW"
        if before is None and name not in _MAY_BE_UNKNOWN:
            return f"{name} is not recorded"
        if name == "untrained" and before:
            return "untrained in both"
    return ""


def _changed_settings(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """The settings that are in both files and differ, the first few of them; nothing where none does."""
    changed = [name for name in old if name in new and old[name] != new[name]]
    shown = [f"{name} is {_shown(old[name])} in OLD and {_shown(new[name])} in NEW" for name in changed[:SETTINGS]]
    return ", ".join(shown) + (f", and {len(changed) - SETTINGS} more settings" if len(changed) > SETTINGS else "")


def _shown(value: object) -> str:
    return "not recorded" if value is None else str(value)


def _numbers(reports: Mapping[str, Report[Any]]) -> dict[Key, Number]:
    numbers: dict[Key, Number] = {}
    for report in reports.values():
        run = report.run
        for model, result in report.results.items():
            if model in CONTROLS:  # they test the measurement, and nobody's change makes them better or worse
                continue
            conditions = {"config_id": result.config_id, "hardware": _hardware(report), "basis": result.basis}
            world_size = {"world_size": report.environment.get("world_size", 1)}
            if isinstance(result, MemoryResult):
                conditions |= world_size | {"batch_size": run.get("batch_size"), "seq_length": run.get("seq_length")}
                key = (model, "peak", _length(run))
                numbers[key] = Number(result.peak_allocated_bytes, result.status, conditions, result.config, result.detail)
            elif isinstance(result, PerplexityResult):
                conditions |= {name: getattr(result, name) for name in ("protocol_hash", "trained_tokens", "trained_on")}
                conditions |= {"seq_length": run.get("seq_length"), "untrained": result.untrained}
                key = (model, "perplexity", _length(run))
                numbers[key] = Number(result.perplexity, result.status, conditions, result.config, result.detail)
            elif isinstance(result, ThroughputResult):
                conditions |= {"precision": run.get("precision"), "compile": bool(run.get("compile"))}
                conditions |= world_size | {"cuda_graphs": bool(run.get("cuda_graphs"))}
                for m in result.measurements:
                    at_length, key = conditions | {"batch_size": m.batch_size}, (model, "tokens_per_second", m.seq_length)
                    if key in numbers:
                        raise ValueError(
                            f"{model} must have one measurement per length; got T = {m.seq_length} twice; remove one"
                        )
                    detail = m.detail or result.detail
                    numbers[key] = Number(m.tokens_per_second, m.status, at_length, result.config, detail)
    return numbers


def _length(run: Mapping[str, Any]) -> int | None:
    length = run.get("seq_length")
    return length if isinstance(length, int) else None


def _hardware(report: Report[Any]) -> object:
    """The name of the GPU, or that of the processor where the run had none."""
    return report.environment.get("gpu") or report.environment.get("cpu")
