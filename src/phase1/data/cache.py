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


def cached_ids(cache_dir: Path, key: dict[str, Any], dtype: np.dtype, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """`compute()`, or its result of an earlier call with the same `key`: then its file, mapped, not read into memory.

    A file is the SHA-256 of the ids' bytes and the ids, little-endian; one that does not match is made again.
    """
    name = hashlib.sha256(json.dumps(key | {"format": FORMAT}, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir / "tokens" / f"{name}.{dtype.name}"
    stored = dtype.newbyteorder("<")
    if path.is_file():  # no pipe
        ids = _mapped(path, stored)
        if ids is not None:
            return ids.astype(dtype, copy=False)
    ids = compute()
    raw = ids.astype(stored, copy=False).tobytes()
    store(path, hashlib.sha256(raw).digest() + raw)
    return ids


def _mapped(path: Path, stored: np.dtype) -> np.ndarray | None:
    """The ids of a file, read where they are used; None where it is damaged."""
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
    digest = hashlib.sha256()
    for start in range(0, len(ids), 1 << 22):
        digest.update(ids[start : start + (1 << 22)].astype("<u4").tobytes())
    return digest.hexdigest()
