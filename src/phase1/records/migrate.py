"""Result files of older schema versions, brought up to the present one step by step."""

from collections.abc import Callable, Mapping
from typing import Any, Final

SCHEMA_VERSION: Final = 2


def _from_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 only adds fields that may be missing."""
    return content | {"schema_version": 2}


STEPS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""For each version, the pure function that turns its reports into those of the next. Whoever raises SCHEMA_VERSION adds a step,
and fixtures of the version before, as tests/fixtures/v1 are."""


def migrated(content: dict[str, Any], version: int) -> dict[str, Any]:
    """`content`, a report of `version` from 1 to SCHEMA_VERSION, as one of SCHEMA_VERSION; the argument is left as it is."""
    for start in range(version, SCHEMA_VERSION):
        content = STEPS[start](content)
    return content
