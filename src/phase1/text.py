"""Text that may be printed and kept: one line of it, and nothing private in it."""

import re
from pathlib import Path


def one_line(text: object, limit: int = 300) -> str:
    """`text` as one line of printable characters: what comes from files may hold newlines and terminal escapes."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:limit])


def without_private(text: str) -> str:
    """`text` without home folders and without what gives access to something: tokens, passwords, signatures."""
    text = re.sub(r"(?<=://)[^/\s@]+@", "***@", text)
    text = re.sub(r"\b(?:hf|gh[a-z]|github_pat|glpat|sk|xox[a-z])[_-][\w-]{16,}|\bAKIA[0-9A-Z]{16}\b", "***", text)
    keys = r"(?:access_?|auth_?|api_?)?(?:token|key)|secret|password|passwd|credential|sig|signature|x-amz-[a-z-]+"
    text = re.sub(rf"(?i)(?<![a-z])({keys})=[^&\s'\";,]+", r"\1=***", text)
    return without_home(text)


def without_home(text: str) -> str:
    """`text` with home folders, and so the names of users, replaced by ~."""
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    return re.sub(r"(?:/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s'\":;,]+", "~", text)
