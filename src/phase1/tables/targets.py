"""The table of targets: what was set as a number before it was measured, what the records say, and whether it holds."""

import math
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from phase1.tables.rows import benchmark, check, value_at
from phase1.tables.table import Column, Table
from phase1.text import one_line

COLUMNS = (Column("What"), Column("Required"), Column("Goal"), Column("Measured"), Column("Verdict"))
NOT_MEASURED = "not measured"
FAILED = math.nan  # in place of a number


class Place(TypedDict):
    """Where a number is; see `targets_table`."""

    record: str
    key: str
    rows: NotRequired[str]
    where: NotRequired[dict[str, object]]
    starts: NotRequired[dict[str, str]]
    pick: NotRequired[Literal["least", "most"]]
    scale: NotRequired[float]


class Target(TypedDict):
    """A number and its limit; see `targets_table`."""

    what: str
    at_least: NotRequired[float]
    at_most: NotRequired[float]
    goal: NotRequired[float]
    unit: NotRequired[str]
    value: object  # a place, or a list of them
    over: NotRequired[object]
    percent: NotRequired[bool]


class Targets(TypedDict):
    """A file of targets."""

    targets: list[dict[str, object]]


def targets_table(folder: Path, entry: dict[str, Any], file: str) -> Table:
    """The table of the `targets` that `entry` lists, of records in `folder`; errors name `file`, from which they are.

    A target has `what`, a limit `at_least` or `at_most`, perhaps a `goal` beyond it and a `unit`, and places of its `value`.
    With places `over` it is the ratio of the two; with `percent`, how many percent the value is above the other. Of several
    places, as many on both sides, it is the geometric mean. A place is a `record` and the dotted `key` of a number in it, or
    in the one row of its `rows` that has all that `where` says and begins as `starts` says; of several rows the "least" or
    the "most", as `pick` says. `scale` multiplies it. Beside a number that is not there a record may say that it `failed`: that
    misses any limit. Not measured is what has no record yet, or null at its key.
    Raises ValueError (one line that names the target) for a key or a value that none of these is, and for a place that fits
    nothing in a record that is there, or several rows.
    """
    rows = tuple(
        _row(folder, target, f"{file}: target {number} ({one_line(target.get('what', 'it does not say what'))})")
        for number, target in enumerate(entry["targets"], 1)
    )
    return Table(entry["name"], entry["caption"], "", COLUMNS, rows)


def _row(folder: Path, target: dict[str, Any], name: str) -> tuple[str, str, str | None, str, str]:
    check(target, Target, name)
    least = "at_least" in target
    if least == ("at_most" in target):
        raise ValueError(f"{name}: expected a limit, at_least or at_most; got {'both' if least else 'none'}; correct it")
    limit, unit = target["at_least" if least else "at_most"], target.get("unit", "")
    sign = "≥" if least else "≤"
    value = _value(folder, target, name)
    goal = f"{sign} {_text(target['goal'], unit)}" if "goal" in target else None
    if value is None:
        return target["what"], f"{sign} {_text(limit, unit)}", goal, NOT_MEASURED, NOT_MEASURED
    if math.isnan(value):
        return target["what"], f"{sign} {_text(limit, unit)}", goal, "failed", "FAIL"
    held = value >= limit if least else value <= limit
    digits = next((n for n in range(3, 8) if held or _text(value, unit, n) != _text(limit, unit, n)), 8)  # a miss shows
    return target["what"], f"{sign} {_text(limit, unit)}", goal, _text(value, unit, digits), "PASS" if held else "FAIL"


def _value(folder: Path, target: dict[str, Any], name: str) -> float | None:
    """The number of a target, None if one of it is not measured."""
    values = _numbers(folder, target["value"], f"{name}, value")
    others = _numbers(folder, target["over"], f"{name}, over") if "over" in target else [1.0] * len(values)
    if not values or len(values) != len(others):
        raise ValueError(f"{name}: expected as many places over as of the value; got {len(values)}, {len(others)}; correct it")
    numbers = [number for number in values + others if number is not None]
    if len(numbers) < 2 * len(values):
        return None
    if any(map(math.isnan, numbers)):
        return FAILED
    ratios = list(map(_ratio, numbers[: len(values)], numbers[len(values) :]))
    if len(ratios) == 1:
        mean = ratios[0]
    elif min(ratios) <= 0:
        raise ValueError(f"{name}: expected a geometric mean of numbers above 0; got {min(ratios):.3g}; correct the record")
    else:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return 100 * (mean - 1) if target.get("percent") else mean


def _ratio(value: float, other: float) -> float:
    """Of two numbers, not negative: a difference of 0 is no part of any noise, and every other infinitely more than none."""
    if other == 0:
        return math.inf if value > 0 else 0.0
    return value / other


def _numbers(folder: Path, places: Any, name: str) -> list[float | None]:
    return [_number(folder, place, name) for place in (places if isinstance(places, list) else [places])]


def _number(folder: Path, place: Any, name: str) -> float | None:
    check(place, Place, name)
    if "rows" not in place and not place.keys().isdisjoint(("where", "starts", "pick")):
        raise ValueError(f"{name}: expected rows, of which where, starts and pick say one; got none; add the key of the rows")
    path = folder / place["record"]
    if not path.exists():
        return None
    found = benchmark(path)
    name = f"{name}: {place['record']}"
    if "rows" not in place:
        values = [_or_failed(found, place["key"], name)]
    else:
        rows = value_at(found, place["rows"], name)
        rows = list(rows.values()) if isinstance(rows, dict) else rows
        check(rows, list, f"{name}, {place['rows']}")
        fitting = [(number, row) for number, row in enumerate(rows, 1) if _fits(row, place)]
        values = [_or_failed(row, place["key"], f"{name}, row {number}") for number, row in fitting]
        said = f"{place.get('where', {}) | place.get('starts', {})}"
        if not values:
            raise ValueError(f"{name}: expected a row where {said}; got none in {len(rows)} rows; correct it")
        if len(values) > 1 and "pick" not in place:
            raise ValueError(f"{name}: expected one row where {said}; got {len(values)}; say more of it")
    numbers = [value for value in values if value is not None]
    measured = [value for value in numbers if not math.isnan(value)]
    pick = max if place.get("pick") == "most" else min
    return pick(measured or numbers) * place.get("scale", 1) if numbers else None


def _or_failed(found: Any, key: str, name: str) -> float | None:
    """The number at `key`, FAILED where none is and it is said to have failed, None where the record says null."""
    beside, _, _ = key.rpartition(".")
    value = value_at(found, key, name, optional=True)
    if value is None and value_at(found, f"{beside}.failed", name, optional=True):
        return FAILED
    value = value_at(found, key, name)
    if value is not None:
        check(value, float, f"{name}, {key}")
    return value


def _fits(row: Any, place: dict[str, Any]) -> bool:
    """Whether a place means a row; a table in `where` must be equal, so {} is one without settings."""

    def at(key: str) -> Any:
        return value_at(row, key, "", optional=True)

    begins = all(str(at(key)).startswith(text) for key, text in place.get("starts", {}).items())
    return begins and all(at(key) == value for key, value in place.get("where", {}).items())


def _text(number: float, unit: str, digits: int = 3) -> str:
    rounded = f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.{digits}g}"
    return f"{rounded} {unit}".strip()
