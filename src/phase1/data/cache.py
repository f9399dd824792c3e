"""Files that save a later run the work: token ids by the content they come from."""

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from phase1.files import atomic_write

FORMAT = 2  # raise when the same key must no longer give the same tokens
_DIGEST_BYTES = 32
_BLOCK = 1 << 16  # ids: as uint32 they stay in a core's cache


def cached_ids(cache_dir: Path, key: dict[str, Any], dtype: np.dtype, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """`compute()`, or its result of an earlier call with the same `key`: its file, mapped, not held in memory.

    A file is the SHA-256 of the ids' bytes and the ids, little-endian; one that does not match is made again.
    """
    name = hashlib.sha256(json.dumps(key | {"format": FORMAT}, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir / "tokens" / f"{name}.{dtype.name}"
    stored = dtype.newbyteorder("<")
    found = _mapped(path, stored)
    if found is None:
        ids = compute()
        raw = ids.astype(stored, copy=False).tobytes()
        store(path, hashlib.sha256(raw).digest() + raw)
        del raw
        found = _mapped(path, stored)
        if found is None:  # on a rank that writes no file
            return ids
    return found.astype(dtype, copy=False)


def _mapped(path: Path, stored: np.dtype) -> np.ndarray | None:
    """The ids of a file, read where they are used; None where it is damaged or not there."""
    if not path.is_file():  # a pipe
        return None
    with path.open("rb") as file:
        digest = file.read(_DIGEST_BYTES)
        if hashlib.file_digest(file, "sha256").digest() != digest or (size := file.tell() - _DIGEST_BYTES) % stored.itemsize:
            return None
    if not size:  # nothing can be mapped
        return np.empty(0, stored)
    return np.memmap(path, stored, "c", _DIGEST_BYTES)  # "c": what is written to it stays in memory


def store(path: Path, data: bytes) -> None:
    """Write a file of the cache; ValueError, one line, if the folder cannot be written to."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise ValueError(f"--cache-dir must be a folder with free space; got {error}; give another folder") from error


@functools.cache  # says it once
def cache_folder(cache_dir: str) -> Path:
    """The folder that `--cache-dir` means; a temporary one if it is in the home of a user who has no home."""
    if not cache_dir.startswith("~"):
        return Path(cache_dir)
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"phase1-cache-{user}"
    print(f"--cache-dir {cache_dir}: this user has no home folder; {folder} is used", file=sys.stderr)
    return folder


def ids_sha256(ids: np.ndarray) -> str:
    """SHA-256 of the ids as little-endian uint32, whatever type they are kept in."""
    digest, wide = hashlib.sha256(), np.empty(_BLOCK, "<u4")
    for start in range(0, len(ids), _BLOCK):
        part = ids[start : start + _BLOCK]
        wide[: len(part)] = part
        digest.update(wide[: len(part)].data)
    return digest.hexdigest()
