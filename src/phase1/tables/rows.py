"""The table of a benchmark's record: JSON with a list of rows, or an object of them, shown by the columns that a list names."""

import json
import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from phase1.tables.table import Cell, Column, Table
from phase1.text import one_line

WORDS: Final = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a table"}


class ColumnEntry(TypedDict):
    """What a list says of a column; see `rows_table`."""

    title: str
    key: str
    unit: NotRequired[str]
    digits: NotRequired[int]
    scale: NotRequired[float]
    optional: NotRequired[bool]


class RowsEntry(TypedDict):
    """What a list says of the table of a benchmark's record; see `rows_table`."""

    record: str
    name: str
    caption: str
    rows: str
    columns: list[ColumnEntry]
    facts: NotRequired[list[str]]
    command: NotRequired[str]


def check(content: Any, kind: Any, where: str) -> None:
    """Raise ValueError, one line that begins with `where`, unless `content` is of `kind`.

    kind: a type, a Literal, `list[kind]`, `dict[str, kind]`, or a TypedDict, which names all keys that there may be. An int is
        a float too, a bool is neither, and a float is finite.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if is_typeddict(kind) and isinstance(content, dict):
        kinds = get_type_hints(kind)
        for key in content:
            if key not in kinds:
                near = get_close_matches(key, kinds, n=1)
                hint = f"did you mean {near[0]}?" if near else f"correct it to one of {', '.join(kinds)}"
                raise ValueError(f"{where}: no key is called {one_line(key)}; {hint}")
        for key in kinds:
            if key in kind.__required_keys__ and key not in content:
                raise ValueError(f"{where}: expected the key {key}; got {one_line(', '.join(content)) or 'none'}; add it")
        for key, value in content.items():
            check(value, kinds[key], f"{where}, {key}")
    elif origin is list and isinstance(content, list):
        for number, item in enumerate(content, 1):
            check(item, inner[0], f"{where} {number}")
    elif origin is dict and isinstance(content, dict):
        for key, value in content.items():
            check(value, inner[1], f"{where}, {one_line(key)}")
    elif origin is Literal and content not in inner or origin is not Literal and not _is(content, origin or kind):
        expected = " or ".join(inner) if origin is Literal else WORDS.get(origin or kind, "a table")
        raise ValueError(f"{where}: expected {expected}; got {one_line(repr(content), 60)}; correct it")


def _is(content: Any, kind: Any) -> bool:
    if kind is float:
        return type(content) is int or type(content) is float and math.isfinite(content)
    return kind is object or type(content) is kind


def benchmark(path: Path) -> Any:
    """The content of a benchmark's record: JSON of finite numbers, or such lines as a list. ValueError for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [_json(line, f"line {number}: ") for number, line in enumerate(text.splitlines(), 1)]
        return _json(text)
    except (OSError, ValueError) as error:
        expected = "expected the JSON of a benchmark"
        raise ValueError(f"{one_line(path)}: {expected}; got {one_line(error)}; make it again, or restore it") from error


def _json(text: str, where: str = "") -> Any:
    try:
        return json.loads(text, parse_constant=_infinite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}{error}") from error


def _infinite(literal: str) -> float:
    raise ValueError(f"the number {literal}, which is not finite")


def rows_table(content: Any, entry: dict[str, Any]) -> Table:
    """The table that `entry` asks of `content`.

    entry: `record` (the name of the file), `name`, `caption`, `rows` (dotted key of the rows, "" where the whole file is them,
        or is one) and `columns`, each with `title` and `key` (dotted, inside a row; `key` alone is the name of a row of an
        object), perhaps `unit`, `digits`, `scale`, all three of numbers alone, and `optional` where not every row has one;
        `facts` are dotted keys of what holds for all rows.
    Raises ValueError (one line that names the record, and the row by its number) for a key that is not there, text in place of
    a number, and no rows.
    """
    record = f"results/{entry['record']}"
    columns = tuple(Column(c["title"], c.get("unit", ""), c.get("digits", 2)) for c in entry["columns"])
    rows = tuple(
        tuple(_cell(row, column, f"{record}, row {number}") for column in entry["columns"])
        for number, row in enumerate(_rows(content, entry["rows"], record), 1)
    )
    facts = tuple(f"{key}: {_text(value_at(content, key, record))}" for key in entry.get("facts", ()))
    return Table(entry["name"], entry["caption"], "", columns, rows, facts)


def value_at(content: Any, key: str, where: str, optional: bool = False) -> Any:
    """What is in `content` at a dotted key; "" is all of it. Where nothing is: None if `optional`, else ValueError."""
    for part in filter(None, key.split(".")):
        if not isinstance(content, dict) or part not in content:
            if optional:
                return None
            raise ValueError(f"{where}: expected the key {key}; got none; correct the record, or the key where it is listed")
        content = content[part]
    return content


def _rows(content: Any, key: str, where: str) -> list[dict[str, Any]]:
    rows = value_at(content, key, where)
    if not isinstance(rows, list | dict) or not rows:
        raise ValueError(f"{where}: expected rows at {key!r}; got {one_line(repr(rows), 60)}; correct the record, or `rows`")
    if isinstance(rows, dict) and not all(isinstance(row, dict) for row in rows.values()):
        return [rows]
    return [{"key": name, **row} for name, row in rows.items()] if isinstance(rows, dict) else rows


def _cell(row: dict[str, Any], column: dict[str, Any], where: str) -> Cell:
    value = value_at(row, column["key"], where, column.get("optional", False))
    if value is not None and not column.keys().isdisjoint(("unit", "digits", "scale")):
        check(value, float, f"{where}, {column['key']}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value * column["scale"] if "scale" in column else value
    return None if value is None else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value).strip()
