"""The table of a benchmark's record: JSON with a list of rows, or an object of them, shown by the columns that a list names."""

import json
from pathlib import Path
from typing import Any

from phase1.tables.table import Cell, Column, Table


def benchmark(path: Path) -> Any:
    """The content of a benchmark's record: JSON, or JSON lines as a list."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def rows_table(content: Any, entry: dict[str, Any]) -> Table:
    """The table that `entry` asks of `content`.

    entry: `name`, `caption`, `rows` (dotted key of the rows, "" where the whole file is them, or is one) and `columns`, each
        with `title` and `key` (dotted, inside a row; `key` alone is the name of a row of an object), perhaps `unit`, `digits`,
        `scale`, and `optional` where not every row has one; `facts` are dotted keys of what holds for all rows.
    Raises ValueError (one line) for a key that the file does not have.
    """
    columns = tuple(Column(c["title"], c.get("unit", ""), c.get("digits", 2)) for c in entry["columns"])
    rows = tuple(tuple(_cell(row, column) for column in entry["columns"]) for row in _rows(content, entry["rows"]))
    facts = tuple(f"{key}: {_text(value_at(content, key))}" for key in entry.get("facts", ()))
    return Table(entry["name"], entry["caption"], "", columns, rows, facts)


def value_at(content: Any, key: str, optional: bool = False) -> Any:
    """What is in `content` at a dotted key; "" is all of it. Where nothing is: None if `optional`, else ValueError."""
    for part in filter(None, key.split(".")):
        if not isinstance(content, dict) or part not in content:
            if optional:
                return None
            raise ValueError(f"expected {key} in the record; got none; correct the key in results/page.toml")
        content = content[part]
    return content


def _rows(content: Any, key: str) -> list[dict[str, Any]]:
    rows = value_at(content, key)
    if isinstance(rows, dict) and not all(isinstance(row, dict) for row in rows.values()):
        return [rows]
    return [{"key": name, **row} for name, row in rows.items()] if isinstance(rows, dict) else list(rows)


def _cell(row: dict[str, Any], column: dict[str, Any]) -> Cell:
    value = value_at(row, column["key"], column.get("optional", False))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value * column["scale"] if "scale" in column else value
    return None if value is None else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value).strip()
