"""Text that may be printed and kept: one line of it, and nothing private in it."""

import codecs
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

XZ = b"\xfd7zXZ\x00"  # the first bytes of a compressed file
_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
    (XZ, "xz data"),
)  # fmt: skip
"""How files begin that are other than UTF-8, and what they are."""
_ASCII = {
    "²": "^2",
    "³": "^3",
    "×": "x",
    "±": "+/-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "µ": "u",
    "μ": "u",
    "Σ": "sum",
    "√": "sqrt ",
}
_ASCII |= {"–": "-", "—": "-", "−": "-", "…": "...", "→": "->", "·": "*", "“": '"', "”": '"', "’": "'"}


def ascii_forms(text: str) -> str:
    """`text` with the signs of mathematics and typesetting in ASCII: R², T × T become R^2, T x T."""
    return "".join(_ASCII.get(c, c) for c in text)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an output cannot show: their form in ASCII, or a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("phase1.ascii", _in_ascii)


@contextmanager
def printable_output() -> Iterator[None]:
    """Within the block no print fails on its encoding: a Japanese Windows gets "R^2" for "R²", and "?" for what it lacks."""
    changed: list[tuple[Any, Any]] = []
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="phase1.ascii")
    try:
        yield
    finally:
        for stream, errors in changed:
            with suppress(ValueError, OSError):  # closed meanwhile, or a reader that is gone
                stream.reconfigure(errors=errors)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block what is printed to a closed standard output or error is shown nowhere; a closed input stays None.

    The numbers 0, 1 and 2 are taken, so that no file that is opened gets one of them, and with it what was meant for a screen.
    """
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:
        os.set_inheritable(handle, True)  # a process that is started would find it closed again
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        if sys.stdout is None or sys.stderr is None:
            nowhere = stack.enter_context(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
            sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def utf8_fault(lines: Iterable[bytes]) -> str | None:
    """What of `lines` is no UTF-8, where, and what to do, for the end of a message; None where all is."""
    offset = 0
    for number, line in enumerate(lines, 1):
        if number == 1 and (other := next((name for mark, name in _MARKS if line.startswith(mark)), None)):
            remedy = "let its name end in .xz" if other == "xz data" else f"convert it: iconv -f {other} -t UTF-8"
            return f"got {other}; {remedy}"
        try:
            line.decode()
        except UnicodeDecodeError as error:
            where = f"{error.reason} in line {number}, byte {offset + error.start} of the text"
            return f"got {where}; remove it, or convert the text: iconv -f ENCODING -t UTF-8"
        offset += len(line)
    return None


def printable_name(name: str) -> str:
    """A name from the system as text that can be written: bytes that are no UTF-8, as of old zip archives, become U+FFFD."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half a pair of surrogates that stands for no byte
        return name.encode("utf-8", "replace").decode()


def one_line(text: object, limit: int = 300) -> str:
    """`text` as one line of printable characters: what comes from files may hold newlines and terminal escapes."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:limit])


def without_private(text: str) -> str:
    """`text`, printable, without home folders and without what gives access to something: tokens, passwords, signatures."""
    text = printable_name(text)
    text = re.sub(r"(?<=://)[^/\s@]+@", "***@", text)
    text = re.sub(r"\b(?:hf|gh[a-z]|github_pat|glpat|sk|xox[a-z])[_-][\w-]{16,}|\bAKIA[0-9A-Z]{16}\b", "***", text)
    keys = r"(?:access_?|auth_?|api_?)?(?:token|key)|secret|password|passwd|credential|sig|signature|x-amz-[a-z-]+"
    text = re.sub(rf"(?i)(?<![a-z])({keys})=[^&\s'\";,]+", r"\1=***", text)
    return without_home(text)


def without_home(text: str) -> str:
    """`text` with home folders, and so the names of users, replaced by ~."""
    begin, end = r"(?<![\w.-])", r"(?=$|[/\\\s'\":;,)])"  # a whole path, not /data/root/x for the home /root
    home = os.path.expanduser("~")  # "~" itself where this user has none
    if len(home) > 1:
        text = re.sub(f"{begin}{re.escape(home)}{end}", "~", text)
    name = r"[/\\][^/\\\s'\":;,]+"
    text = re.sub(rf"{begin}(?:/home|/Users|[A-Za-z]:\\Users){name}", "~", text)
    return re.sub(rf"(/home|/Users|\\Users){name}(?=[/\\])", r"\1/***", text)
