"""Text and token files of the user: one text file, or a folder with a file per split."""

import contextlib
import hashlib
import io
import itertools
import json
import lzma
import os
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from phase1.data.text import Document, Text
from phase1.files import open_plain
from phase1.text import XZ, one_line, utf8_fault

VALID_LINES_DIVISOR = 20  # the last 5 % of lines of a single text file, at least one, are its valid split
STEMS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".txt.xz", ".md.xz", ".jsonl.xz")
FIELD = "text"  # of a line of JSON
TOKEN_SUFFIXES = (".gpt2.bin", ".gpt2.bin.xz")
TOKENS_LOOKED_AT = 4096  # of a token file, for the type of its numbers
_NO_XZ = "must be xz data, as its name says; got something else; rename it, without .xz, or compress it (xz)"
_BLOCK = 1 << 20


def local_files(path: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """(text file, token file) of each split of a folder; ValueError where a split has two files of one kind."""
    texts: dict[str, Path] = {}
    tokens: dict[str, Path] = {}
    for split, stems in STEMS.items():
        for found, suffixes in ((texts, TEXT_SUFFIXES), (tokens, TOKEN_SUFFIXES)):
            there = [file for stem in stems for suffix in suffixes if (file := path / (stem + suffix)).is_file()]
            if len(there) > 1:
                names = " and ".join(file.name for file in there)
                kind = "text" if suffixes is TEXT_SUFFIXES else "token"
                raise ValueError(f"{path} must hold one {kind} file of {split}; got {names}; remove all but one")
            if there:
                found[split] = there[0]
    if not texts and not tokens:
        raise ValueError(
            f"{path} must hold train, valid or test as {', '.join(TEXT_SUFFIXES + TOKEN_SUFFIXES)}; got none of them; "
            "rename the files"
        )
    return texts, tokens


def file_text(path: Path) -> Text:
    """A whole file: one document, or one of each line of JSON."""
    if _is_json(path):
        return Text(_key(path), lambda: _json_texts(path, 0, None))
    return Text(_key(path), lambda: iter([_blocks(path)]))


def require_text_name(path: Path) -> None:
    """Raise ValueError for a single file whose name is not that of a text."""
    if not path.name.endswith(TEXT_SUFFIXES):
        as_lines = f"write its texts as {{'{FIELD}': ...}} into lines of a .jsonl file"
        or_tokens = f"put {TOKEN_SUFFIXES[0]} files in a folder as train and valid"
        expected = f"{path} must be a text file ({', '.join(TEXT_SUFFIXES)})"
        raise ValueError(f"{expected}; got another ending; rename it, {as_lines}, or {or_tokens}")


def split_file(path: Path) -> dict[str, Text]:
    """train and valid of one text file: valid is the last 5 % of its lines, at least one. A line of JSON is a document.

    Blank lines do not count between lines of JSON, nor at the end of a text; inside one they part its paragraphs.
    """
    require_text_name(path)
    blank, last = array("Q"), -1  # numbers of the lines that do not count, and of the last line
    with _readable(path), _open_text(path) as file:
        for last, line in enumerate(file):
            if not line.strip():
                blank.append(last)
            elif blank and not _is_json(path):
                del blank[:]
    count = last + 1 - len(blank)
    if count < 2:
        expected = f"{path} must have at least 2 lines that are not blank to be split into train and valid"
        remedy = "break it into lines that end in \\n, or put train.txt and valid.txt into a folder and give that"
        raise ValueError(f"{expected}; got {count}; {remedy}")
    first_valid = count - max(1, count // VALID_LINES_DIVISOR)
    for number in blank:
        first_valid += number <= first_valid
    key = f"{_key(path)}:lines"

    def part(start: int, stop: int) -> Text:
        documents = partial(_json_texts, path, start, stop) if _is_json(path) else lambda: iter([_lines(path, start, stop)])
        return Text(f"{key}:{start}:{stop}", documents)

    return {"train": part(0, first_valid), "valid": part(first_valid, last + 1)}


def read_token_file(path: Path) -> np.ndarray:
    """(N,) uint16 ids of a .gpt2.bin or .gpt2.bin.xz file: little-endian, two bytes each. The first is mapped, not read."""
    packed = path.name.endswith(".xz")
    with _readable(path), _open(path) as file:
        data = file.read() if packed else None
        _require_token_bytes(path, file.read(2 * TOKENS_LOOKED_AT) if data is None else data[: 2 * TOKENS_LOOKED_AT])
        size = len(data) if data is not None else file.seek(0, os.SEEK_END)
        if size % 2:
            raise ValueError(f"{path} must hold two bytes per token; got {size} bytes, an odd number; copy it again")
        if data is not None or not size:  # nothing cannot be mapped
            return np.frombuffer(data or b"", "<u2").astype(np.uint16)  # a writable copy
        return np.memmap(file, "<u2", "c").astype(np.uint16, copy=False)  # "c": what is written to it stays in memory


def _require_token_bytes(path: Path, head: bytes) -> None:
    """Raise ValueError where a file begins as one of NumPy, or as ids of four bytes each: the high halves are all 0."""
    halves = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    got = "a .npy file" if head.startswith(b"\x93NUMPY") else None
    if len(halves) >= 4 and not halves[1::2].any() and halves[::2].any():
        got = "uint32, four bytes per token"
    if got is not None:
        remedy = f"write ids.astype('<u2').tofile({path.name.removesuffix('.xz')!r})"
        raise ValueError(f"{path} must hold little-endian uint16, two bytes per token; got {got}; {remedy}")


def _open(path: Path) -> IO[Any]:
    file = open_plain(path)
    return lzma.open(file, "rb") if path.name.endswith(".xz") else file


def _open_text(path: Path) -> IO[str]:
    # newline="\n": text is kept as it is, and only \n ends a line; a byte order mark is none of the text
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors in one line for a file that cannot be read or is not what its name says."""
    try:
        yield
    except UnicodeDecodeError as error:
        with _readable(path), _open(path) as file:
            fault = utf8_fault(file) or f"got {error.reason}; convert it (iconv)"
        raise ValueError(f"{path} must be UTF-8 text; {fault}") from error
    except lzma.LZMAError as error:
        with open_plain(path) as file:
            packed = file.read(len(XZ)) == XZ
        got = f"must be a readable file; got {error}; copy it again" if packed else _NO_XZ
        raise ValueError(f"{path} {got}") from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} must be a readable file; got {error}; copy it again") from error


def _blocks(path: Path) -> Document:
    with _readable(path), _open_text(path) as file:
        while block := file.read(_BLOCK):
            yield block


def _lines(path: Path, start: int, stop: int | None) -> Iterator[str]:
    with _readable(path), _open_text(path) as file:
        yield from itertools.islice(file, start, stop)


def _key(path: Path) -> str:
    """What identifies the text of a file: its bytes, and how they are read."""
    return f"{'json' if _is_json(path) else 'text'}{'.xz' if path.name.endswith('.xz') else ''}:{_file_sha256(path)}"


def _is_json(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.xz"))


def _json_texts(path: Path, start: int, stop: int | None) -> Iterator[Document]:
    """Of each line that is not empty, its text."""
    for number, line in enumerate(_lines(path, start, stop), start + 1):
        if line.strip():
            yield [_json_text(path, number, line)]


def _json_text(path: Path, number: int, line: str) -> str:
    expected = f'line {number} of {path} must be a JSON object with a string "{FIELD}"'
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}; got {one_line(str(error), 80)}; mend the line") from error
    if not isinstance(found, dict):
        raise ValueError(f'{expected}; got {_json_kind(found)}; write it as {{"{FIELD}": ...}}, or remove the line')
    if FIELD not in found:
        got = one_line(", ".join(map(str, found)), 80) or "none"
        raise ValueError(f"{expected}; got {got}; rename the field, or write the texts into a .txt file")
    if not isinstance(found[FIELD], str):
        raise ValueError(f"{expected}; got {_json_kind(found[FIELD])}; remove the line or give a string")
    return str(found[FIELD]).encode("utf-8", "replace").decode()  # JSON can spell half a character


def _json_kind(value: Any) -> str:
    """What JSON calls a value that is no string and no object."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}[type(value)]


def _file_sha256(path: Path) -> str:
    with _readable(path), open_plain(path) as file:
        return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
