"""The published JSON Schemas: `python -m phase1.records.json_schema` writes them to schemas/ in the current folder."""

import json
from pathlib import Path
from typing import Any

from phase1.files import atomic_write
from phase1.records.migrate import SCHEMA_VERSION
from phase1.records.schema import MemoryResult, PerplexityResult, Report, ThroughputResult

FOLDER = "schemas"
_MODELS: dict[str, type[Report[Any]]] = {
    "memory": Report[MemoryResult],
    "throughput": Report[ThroughputResult],
    "perplexity": Report[PerplexityResult],
}


def schema(kind: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the reports of `kind`.

    Rules between fields, such as "a result with status ok has its numbers", are not in it: `read_report` checks them.
    """
    generated = _MODELS[kind].model_json_schema()
    generated["properties"]["kind"] = {"const": kind, "title": "Kind"}
    names = {"$id": f"urn:phase1:{kind}-report:{SCHEMA_VERSION}"}
    names |= {"title": f"phase1 {kind} report, schema_version {SCHEMA_VERSION}"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | generated | names


def text(kind: str) -> str:
    """The content of the published file."""
    return json.dumps(schema(kind), indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write the schema of every kind to schemas/ in the current folder."""
    for kind in _MODELS:
        path = Path(FOLDER) / f"{kind}.schema.json"
        atomic_write(path, text(kind).encode())
        print(f"written: {path}")


if __name__ == "__main__":
    main()
