"""JSON Schema as far as the published schemas use it, so that conformance is tested against the files and not their models."""

import math

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
NOTES = {"$schema", "$id", "$defs", "title", "description", "default"}


def violations(value, schema, root=None, place="report"):
    """Every place where `value` breaks `schema`, as text; AssertionError for a keyword that is not known here."""
    root = root or schema
    if "$ref" in schema:
        target = root
        for key in schema["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        yield from violations(value, target, root, place)
    if "anyOf" in schema and all(any(True for _ in violations(value, part, root)) for part in schema["anyOf"]):
        yield f"{place}: none of the alternatives"
    if "type" in schema and not is_of(value, schema["type"]):
        yield f"{place}: {value!r:.40} is no {schema['type']}"
        return
    if "const" in schema and (value != schema["const"] or isinstance(value, bool) != isinstance(schema["const"], bool)):
        yield f"{place}: {value!r:.40} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place}: {value!r:.40} is not one of {schema['enum']}"
    if isinstance(value, dict):
        yield from object_violations(value, schema, root, place)
    if isinstance(value, list):
        yield from array_violations(value, schema, root, place)
    known = NOTES | {"$ref", "anyOf", "type", "const", "enum", "properties", "required", "additionalProperties"}
    unknown = schema.keys() - known - {"items", "prefixItems", "minItems", "maxItems"}
    assert not unknown, unknown


def is_of(value, name):
    if name in ("number", "integer"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return is_number and (name == "number" or value == int(value))
    return isinstance(value, TYPES[name])


def object_violations(value, schema, root, place):
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
    yield from (f"{place}: no {name}" for name in schema.get("required", ()) if name not in value)
    for key, item in value.items():
        if key in properties:
            yield from violations(item, properties[key], root, f"{place}.{key}")
        elif extra is False:
            yield f"{place}: {key} is not allowed"
        elif extra is not True:
            yield from violations(item, extra, root, f"{place}.{key}")


def array_violations(value, schema, root, place):
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        yield f"{place}: {len(value)} items"
    first = schema.get("prefixItems", [])
    for i, item in enumerate(value):
        part = first[i] if i < len(first) else schema.get("items", {})
        yield from violations(item, part, root, f"{place}[{i}]")
