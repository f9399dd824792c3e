"""Files that survive: written whole or not at all, read as strict JSON or not at all."""

import json
import math
import os
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

from phase1.text import one_line

MAX_JSON_BYTES = 64 * 2**20  # a report is some kilobytes; a file this large is not one


def atomic_write(path: Path | str, data: bytes) -> None:
    """Put `data` at `path` so that a crash at any moment leaves the old or the new content, never a part.

    Makes missing folders. Raises OSError, with the old file untouched and no temporary file left; only where the last
    step, the fsync of the folder, fails, the new content is already there, whole, but may not survive a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def append_text(path: Path, text: str) -> None:
    """Put `text` at the end of the file at `path`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path | str) -> Any:
    """The content of a strict JSON file: UTF-8, finite numbers, no key twice in an object.

    Raises ValueError, one line that says what the file is instead, without its name.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"no readable file ({error.strerror})") from error
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES // 2**20} MiB")
    try:
        content = json.loads(
            data.decode(), parse_constant=_finite, parse_float=_finite, parse_int=_integer, object_pairs_hook=_no_duplicates
        )
        json.dumps(content, ensure_ascii=False).encode()  # refuses half a surrogate pair, which no file could hold
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"no strict JSON ({one_line(error)})") from error
    return content


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"the number {literal:.40} is not finite")
    return number


def _integer(literal: str) -> int:
    """An integer that a float can hold too: a larger one breaks whoever divides it, as every table does."""
    _finite(literal)
    return int(literal)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        times = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key in times if times[key] > 1)!r:.80} is there twice")
    return content
