"""An English text that comes with every Python: its language reference and the docstrings of its library."""

import ast
import contextlib
import functools
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

from phase1.data.cache import store
from phase1.data.text import Text
from phase1.errors import Unavailable

# tests and vendored packages differ between distributions of one Python version
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
HELD_OUT_EVERY = 20  # of every 20 documents, the 10th goes to test and the 20th to valid
MIN_BYTES = 1_500_000  # a Python 3.12 of Ubuntu, with less than the usual, has 1.9 million


def builtin_texts(cache_dir: Path) -> dict[str, Text]:
    """train, valid and test of the embedded corpus; the same for the same Python.

    A document is a topic of `pydoc_data.topics` or all docstrings of one module, found without importing it.
    Raises Unavailable where this Python came without its sources.
    """
    documents = builtin_documents(cache_dir)
    size = sum(len(document.encode()) for document in documents)
    if size < MIN_BYTES:
        raise Unavailable(
            f"--dataset-name builtin needs {MIN_BYTES} bytes of documentation from this Python's library; got {size}; "
            "use a Python with its .py sources or --dataset-name PATH"
        )
    return {name: _text(_part(documents, name)) for name in ("train", "valid", "test")}


def _part(documents: tuple[str, ...], name: str) -> tuple[str, ...]:
    places = {"test": HELD_OUT_EVERY // 2 - 1, "valid": HELD_OUT_EVERY - 1}
    if name in places:
        return documents[places[name] :: HELD_OUT_EVERY]
    return tuple(text for i, text in enumerate(documents) if i % HELD_OUT_EVERY not in places.values())


def _text(documents: tuple[str, ...]) -> Text:
    key = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
    return Text(f"text:{key}", lambda: iter([document] for document in documents))


@functools.cache
def builtin_documents(cache_dir: Path) -> tuple[str, ...]:
    """All documents in a fixed order. Kept under `cache_dir`, since parsing the library takes seconds."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    paths = {name: path for name, path in sorted(paths.items()) if not _SKIPPED & set(name.split("/"))}
    key = json.dumps([1, sys.version, [(name, path.stat().st_size) for name, path in paths.items()]])
    stored = cache_dir / "builtin" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if stored.is_file():
        with contextlib.suppress(ValueError):  # damaged, and so made again
            return tuple(json.loads(stored.read_text(encoding="utf-8")))
    documents = _topics() + tuple(text for path in paths.values() if (text := docstrings(path.read_bytes())))
    store(stored, json.dumps(documents).encode())
    return documents


def _topics() -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; builtin_texts decides whether enough is left
        return ()
    return tuple(topics[name] for name in sorted(topics))


def docstrings(source: bytes) -> str:
    """The docstrings of a module and its classes and functions, a blank line between them, a newline at the end."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # lib2to3 and others keep files of older Pythons as data
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
    return "\n\n".join(found) + "\n" if found else ""
