"""Result files of older schema versions, brought up to the present one step by step."""

from collections.abc import Callable, Mapping
from typing import Any, Final

SCHEMA_VERSION: Final = 3


def _from_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 only adds fields that may be missing."""
    return content | {"schema_version": 2}


def _from_2(content: dict[str, Any]) -> dict[str, Any]:
    """Version 3 calls `basis` what was called `measured`, of results and of their searches for the largest size."""
    results = content.get("results")
    if isinstance(results, dict):
        content = content | {"results": {key: _with_basis(result) for key, result in results.items()}}
    return content | {"schema_version": 3}


def _with_basis(record: Any) -> Any:
    """`record` with its `measured` called `basis`; what is no record, or has both, is left for the reader to refuse."""
    if not isinstance(record, dict):
        return record
    if "measured" in record and "basis" not in record:
        record = {"basis" if name == "measured" else name: value for name, value in record.items()}
    fits = record.get("fit")
    return record | {"fit": [_with_basis(fit) for fit in fits]} if isinstance(fits, list) else record


STEPS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}
"""For each version, the pure function that turns its reports into those of the next. Whoever raises SCHEMA_VERSION adds a step,
and fixtures of the version before, as tests/fixtures/v1 are."""


def migrated(content: dict[str, Any], version: int) -> dict[str, Any]:
    """`content`, a report of `version` from 1 to SCHEMA_VERSION, as one of SCHEMA_VERSION; the argument is left as it is."""
    for start in range(version, SCHEMA_VERSION):
        content = STEPS[start](content)
    return content
