"""Files damaged in any way: what a crash, another program or a hostile one may leave in place of a result."""

import copy
import json
from pathlib import Path

from phase1.records.schema import FILES
from tests.reports import all_reports

MEASURED = Path(__file__).parents[1] / "results" / "archive" / "h100"


def places(value, path=()):
    """Every place in a JSON value but the root."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


MARK = "put the literal here"
LITERALS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "5e-324", "-0", "-1", "0", "0.5", "01", "+1", "0x10", ".5", "1.",
    "9" * 19, "9" * 400, "9" * 4000, "-" + "9" * 5000, "1" + "0" * 308, "null", "true", "None", "'x'", '""', '"x"', '"\\ud800"',
    '"\\u001b[2J\\n"', '"\x1b[31m"', '"\u2028\u202e\u0085"', '"' + "x" * 5000 + '"', "[]", "{}", "[[]]", '{"a": 1}', "[1, 2]",
    '{"a": 1, "a": 2}', '{"\x1b]0;x\x07": 1}', '{"\\n": 1, "\\n": 2}', "", ",", "}", "//", "/* */ 1",
]  # fmt: skip
DEPTHS = (50, 200, 400, 600, 800, 900, 950, 1000, 2000, 10_000, 100_000)
FOREIGN = [
    b"", b" ", b"\n", b"null", b"[]", b"{}", b"3", b'"x"', b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"\x00" * 100, b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n", b"<html></html>", b"a,b\n1,2\n", b'{"name": "x", "version": "1.0"}', b'{"schema_version": 1}',
    b'{"schema_version": 3, "kind": "memory"}', b'{"schema_version": 1e400, "kind": "memory"}', b'{"kind": []}',
    b'{"schema_version": 1, "kind": "memory"}', b'{"schema_version": 1, "kind": {}, "results": []}', b"{}{}", b"{} x",
    b'{"cells": [], "nbformat": 4}', b"---\na: 1\n", b"\x80\x04\x95.", b"{" * 100_000, b'{"a":' * 100_000, b"[" * 100_000,
    b"{" + b",".join(b'"k%d": 1' % i for i in range(30_000)) + b', "k29999": 2}',
    b'{"schema_version": ' + b"9" * 4000 + b', "kind": "memory"}',
]  # fmt: skip


def literal(rng):
    """A JSON literal, or what some program takes for one; one in eight is deep."""
    if rng.random() > 0.125:
        return rng.choice(LITERALS)
    depth, (opening, closing) = rng.choice(DEPTHS), rng.choice([("[", "]"), ('{"a":', "}")])
    return opening * depth + "0" + closing * (depth if rng.random() < 0.8 else 0)


def replaced(rng, content):
    """Another literal somewhere: wrong types, huge and non-finite numbers, deep nesting, hostile text, broken JSON."""
    content = copy.deepcopy(content)
    *parents, last = rng.choice(list(places(content)))
    target = content
    for key in parents:
        target = target[key]
    target[last] = MARK
    return json.dumps(content).replace(json.dumps(MARK), literal(rng)).encode()


def renamed(rng, content):
    """A key left out, added, renamed or given twice."""
    content = copy.deepcopy(content)
    objects = [
        content,
        *(item for item in map(lambda path: at(content, path), places(content)) if isinstance(item, dict) and item),
    ]
    target = rng.choice(objects)
    key = rng.choice(list(target))
    new = rng.choice(["x", "", "\x1b[2J", "a\nb", "__class__", "results", "schema_version", "x" * 9000, "é", key])
    if rng.random() < 0.5:
        target[new] = target.pop(key)
        return json.dumps(content, ensure_ascii=rng.random() < 0.5).encode()
    target[MARK] = rng.choice([1, None, [], {}])
    return json.dumps(content).replace(json.dumps(MARK), json.dumps(new)).encode()


def at(content, path):
    for key in path:
        content = content[key]
    return content


def cut(rng, data):
    """Cut anywhere, or right at, before or behind a character that means something to JSON."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    sign = rng.choice(b'{}[]",:\n0')
    ends = [i for i, byte in enumerate(data) if byte == sign] or [0]
    end = max(0, rng.choice(ends) + rng.choice([-1, 0, 1]))
    return rng.choice([data[:end], data[end:]])


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def spliced(rng, data):
    """Bytes deleted, doubled, zeroed (as after a crash of a file system) or strange ones put in."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 1, 2, 10, 512, 4096]))
    middle = [
        b"",
        b"",
        data[start:end] * 2,
        b"\0" * (end - start),
        rng.randbytes(4),
        b"\x1b[2J",
        b"\xed\xa0\x80",
        b"\r\n",
        b"NaN",
    ]
    return data[:start] + rng.choice(middle) + data[end:]


def damaged(rng, reports):
    """One damaged file: (what was done, bytes, the kind it is read as)."""
    kind, data, content = rng.choice(reports)
    how = rng.choice(["replaced", "replaced", "replaced", "renamed", "cut", "flipped", "spliced", "foreign"])
    if how in ("replaced", "renamed"):
        data = globals()[how](rng, content)
    elif how == "foreign":
        data = rng.choice([*FOREIGN, rng.randbytes(rng.randrange(300))])
    else:
        data = globals()[how](rng, data)
    if rng.random() < 0.02:  # one in fifty is damaged twice
        data = cut(rng, data or b"{")
    return how, data, kind if rng.random() < 0.95 else rng.choice(list(FILES))


def real_reports():
    """The reports of the tests and the measured ones, as (kind, bytes, JSON)."""
    texts = [(kind, report.model_dump_json(indent=2).encode()) for kind, report in all_reports().items()]
    texts += [(kind, (MEASURED / name).read_bytes()) for kind, name in FILES.items()]
    return [(kind, data, json.loads(data)) for kind, data in texts]
