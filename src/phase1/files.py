"""Files that survive: written whole or not at all, read as strict JSON or not at all."""

import contextlib
import errno
import json
import math
import os
import platform
import re
import secrets
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from phase1.text import one_line
from phase1.world import is_first

MAX_JSON_BYTES = 16 * 2**20  # a report has some kilobytes; a larger file is not a report


def atomic_write(path: Path | str, data: bytes) -> None:
    """Put `data` at `path` so that a crash at any moment leaves the old or the new content, never a part.

    In a run of several processes rank 0 writes, and the others only call this.
    What killed writers have left in the folder is removed afterwards.
    Makes missing folders. Raises OSError, with the old file untouched and no temporary file left; only where the last
    step, the fsync of the folder, fails, the new content is already there, whole, but may not survive a power cut.
    """
    path = Path(path)
    if not is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_machine()}-{os.getpid():x}-{secrets.token_hex(3)}.tmp")
    try:
        with naming(path), temporary.open("xb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    _remove_orphans(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the name of a file into errors that do not know it: those of `write` and `flush`, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-([0-9a-f]+)-[0-9a-f]{6}\.tmp")


def _machine() -> str:
    """Eight hex digits of the machine's name: a process number means nothing on another one that shares the folder."""
    return f"{zlib.crc32(platform.node().encode('utf-8', 'replace')):08x}"


def _remove_orphans(folder: Path) -> None:
    """Remove temporary files of processes of this machine that no longer run, because they were killed while writing."""
    with contextlib.suppress(OSError):
        found = [(name, of) for name in os.listdir(folder) if (of := _TEMPORARY.fullmatch(name)) and of[1] == _machine()]
        if found:
            import psutil

            for name, of in found:
                if not psutil.pid_exists(int(of[2], 16)):
                    (folder / name).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file where there is one, as `atomic_write` writes it: on rank 0."""
    if is_first():
        path.unlink(missing_ok=True)


def absent(folder: Path) -> list[Path]:
    """`folder` and those that it is in, as far as there are none, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove these, the innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def append_text(path: Path, text: str) -> None:
    """Put `text` at the end of the file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def open_to_append(path: Path) -> BinaryIO:
    """The file at `path`, opened to append lines; a reader must skip a last line that a killed process left incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold `folder` for the block; ValueError where another process holds it. Ends with the process, and leaves no file.

    Where the system or its disk has no such locks nothing is held.
    """
    try:
        import fcntl  # not on Windows

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                expected = f"--out-dir {one_line(folder)}: expected no other training in it; got one that is running"
                raise ValueError(f"{expected}; wait for its end, or give another --out-dir") from None
        yield
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    """`os.fsync`, which network and shared folders may not support: then nothing is done."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def open_plain(path: Path | str) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for a folder, a pipe or a device, on which reading might never end."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no plain file, but a folder, pipe or device", str(path))
    return os.fdopen(handle, "rb")


def read_json(path: Path | str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a strict JSON file: UTF-8, finite numbers, no key twice in an object, at most `max_bytes`.

    Raises ValueError, one line that says what the file is instead, without its name.
    """
    try:
        with open_plain(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"no readable file ({error.strerror})") from error
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes // 2**20} MiB")
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
    """An integer, refused if no float can hold it: tables divide every number."""
    _finite(literal)
    return int(literal)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        times = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key in times if times[key] > 1)!r:.80} is there twice")
    return content
