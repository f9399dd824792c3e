"""The table of targets: what was set as a number before it was measured, what the records say, and whether it holds."""

import math
from pathlib import Path
from typing import Any

from phase1.tables.rows import benchmark, value_at
from phase1.tables.table import Column, Table

COLUMNS = (Column("What"), Column("Required"), Column("Goal"), Column("Measured"), Column("Verdict"))
NOT_MEASURED = "not measured"
FAILED = math.nan  # in place of a number


def targets_table(folder: Path, entry: dict[str, Any]) -> Table:
    """The table of the `targets` that `entry` lists, of records in `folder`.

    A target has `what`, a limit `at_least` or `at_most`, perhaps a `goal` beyond it and a `unit`, and places of its `value`.
    With places `over` it is the ratio of the two; with `percent`, how many percent the value is above the other. Of several
    places, as many on both sides, it is the geometric mean. A place is a `record` and the dotted `key` of a number in it, or
    in the one row of its `rows` that has all that `where` says and begins as `starts` says; of several rows the "least" or
    the "most", as `pick` says. `scale` multiplies it. Beside a number that is not there a record may say that it `failed`: that
    misses any limit.
    Raises ValueError (one line) for a place that fits no row or several.
    """
    rows = tuple(_row(folder, target) for target in entry["targets"])
    return Table(entry["name"], entry["caption"], "", COLUMNS, rows)


def _row(folder: Path, target: dict[str, Any]) -> tuple[str, str, str | None, str, str]:
    least = "at_least" in target
    limit, unit = target["at_least" if least else "at_most"], target.get("unit", "")
    sign = "≥" if least else "≤"
    value = _value(folder, target)
    goal = f"{sign} {_text(target['goal'], unit)}" if "goal" in target else None
    if value is None:
        return target["what"], f"{sign} {_text(limit, unit)}", goal, NOT_MEASURED, NOT_MEASURED
    if math.isnan(value):
        return target["what"], f"{sign} {_text(limit, unit)}", goal, "failed", "FAIL"
    held = value >= limit if least else value <= limit
    digits = next((n for n in range(3, 8) if held or _text(value, unit, n) != _text(limit, unit, n)), 8)  # a miss shows
    return target["what"], f"{sign} {_text(limit, unit)}", goal, _text(value, unit, digits), "PASS" if held else "FAIL"


def _value(folder: Path, target: dict[str, Any]) -> float | None:
    """The number of a target, None if a record or a row of it is not there."""
    values = _numbers(folder, target["value"])
    others = _numbers(folder, target["over"]) if "over" in target else [1.0] * len(values)
    if not values or None in values or None in others:
        return None
    ratios = [
        _ratio(value, other) for value, other in zip(values, others, strict=True) if value is not None and other is not None
    ]
    mean = ratios[0] if len(ratios) == 1 else math.exp(sum(map(math.log, ratios)) / len(ratios))
    return 100 * (mean - 1) if target.get("percent") else mean


def _ratio(value: float, other: float) -> float:
    """Of two numbers, not negative: a difference of 0 is no part of any noise, and every other infinitely more than none."""
    if other == 0:
        return math.inf if value > 0 else 0.0
    return value / other


def _numbers(folder: Path, places: Any) -> list[float | None]:
    return [_number(folder, place) for place in (places if isinstance(places, list) else [places])]


def _number(folder: Path, place: dict[str, Any]) -> float | None:
    path = folder / place["record"]
    if not path.exists():
        return None
    found = benchmark(path)
    if "rows" not in place:
        values = [_or_failed(found, place["key"])]
    else:
        rows = value_at(found, place["rows"], optional=True) or []
        rows = rows.values() if isinstance(rows, dict) else rows
        values = [value_at(row, place["key"], optional=True) for row in rows if _fits(row, place)]
    values = [float(value) for value in values if value is not None]
    if len(values) > 1 and "pick" not in place:
        raise ValueError(f"{place['record']}: expected one row where {place['where']}; got {len(values)}; say more of it")
    pick = max if place.get("pick") == "most" else min
    return pick(values) * place.get("scale", 1) if values else None


def _or_failed(found: Any, key: str) -> Any:
    """The number at `key`, FAILED where it is said to have failed, else None."""
    beside, _, _ = key.rpartition(".")
    value = value_at(found, key, optional=True)
    failed = value is None and beside and value_at(found, f"{beside}.failed", optional=True)
    return FAILED if failed else value


def _fits(row: Any, place: dict[str, Any]) -> bool:
    """Whether a place means a row; a table in `where` must be equal, so {} is one without settings."""
    begins = all(str(value_at(row, key, optional=True)).startswith(text) for key, text in place.get("starts", {}).items())
    return begins and all(value_at(row, key, optional=True) == value for key, value in place["where"].items())


def _text(number: float, unit: str, digits: int = 3) -> str:
    rounded = f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.{digits}g}"
    return f"{rounded} {unit}".strip()
