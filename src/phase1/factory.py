"""A model of the user's own, as it is named on the command line: `NAME=package.module:factory`."""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

from phase1.errors import is_out_of_memory, reason

NAME = r"[a-z][a-z0-9_]{0,63}"
_REFERENCE = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
_SPELLING = re.compile(rf"(?:(?P<name>{NAME})=)?(?P<factory>{_REFERENCE})(?:@(?P<source>[0-9a-f]{{12}}))?")
FORM = "[NAME=]package.module:factory, NAME of small letters, digits and _"
NEAREST = 3  # names that a misspelt one may have meant
_OURS = Path(__file__).resolve().parent
_PYTHONS = Path(sysconfig.get_paths()["stdlib"]).resolve()


class WrongReference(ValueError):
    """A reference names nothing: no such module, no function in it. Whatever else is wrong is wrong in the user's module."""


def split(text: str) -> tuple[str, str]:
    """Name and reference of `[NAME=]package.module:factory[@source]`; without a name it is that of the factory.

    Raises ValueError for any other text.
    """
    found = _SPELLING.fullmatch(text)
    if found is None:
        raise ValueError(f"--model must be {FORM}; got {text!r:.120}; correct it")
    source = f"@{found['source']}" if found["source"] else ""
    return found["name"] or found["factory"].partition(":")[2].lower(), found["factory"] + source


def pinned(reference: str) -> str:
    """`package.module:factory@source`: the reference with twelve hex digits of the SHA-256 of its module's file.

    Modules are looked for in the working directory first, as `python -m` does. Nothing of the module runs here, but the
    packages around it are imported. Raises ValueError where there is no such module, or a reference with another source.
    """
    plain, _, wanted = reference.partition("@")
    module = plain.partition(":")[0]
    if module == "__main__":
        raise WrongReference(f"--model {plain} must be importable by other processes; got __main__; define it in a module")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(module)
    except BaseException as error:  # ImportError of a package around it, or whatever that package raises
        pass_on(error)
        missing = isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}.")
        kind = WrongReference if missing else ValueError
        raise kind(f"--model {plain}: module {module} must be importable; got {raised(error)}") from error
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        where = f"in {here} or where Python looks"
        raise WrongReference(f"--model {plain}: no module {module} {where}; set PYTHONPATH, or go to its folder")
    source = sha256(Path(spec.origin).read_bytes()).hexdigest()[:12]
    if wanted not in ("", source):
        raise ValueError(f"--model {plain} must have source {wanted}; got {source}: {module} has changed; go back to that one")
    return f"{plain}@{source}"


def call(reference: str, arguments: dict[str, Any]) -> Any:
    """What the factory of a reference returns for those of `arguments` that it names, all where it takes **keywords.

    Raises ValueError, one line with the place in the user's file, for whatever goes wrong in it but for memory that runs out.
    """
    plain = pinned(reference).partition("@")[0]
    module, _, name = plain.partition(":")
    try:
        found = importlib.import_module(module)
    except BaseException as error:
        pass_on(error)
        raise ValueError(f"--model {plain}: importing {module} raised {raised(error)}") from error
    factory = getattr(found, name, None)
    if not callable(factory):
        known = [key for key, value in vars(found).items() if inspect.isfunction(value) and value.__module__ == module]
        got = "no such name" if factory is None else f"a {type(factory).__name__}"
        near = get_close_matches(name, known, NEAREST, 0)
        others = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
        has = f"it has {', '.join(near)}{others}" if known else "it has none"
        raise WrongReference(f"--model {plain} must name a function of {module}; got {got}; {has}")
    return _called(factory, plain, arguments)


def _called(factory: Callable[..., Any], plain: str, arguments: dict[str, Any]) -> Any:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model {plain} must be a Python function; got {factory!r:.80}") from error
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {p.name for p in parameters if p.name in named and p.default is p.empty} - arguments.keys()
    if needed:
        expected = f"--model {plain} may need {', '.join(arguments)} and nothing else"
        raise ValueError(f"{expected}; got {', '.join(sorted(needed))} too; give it a default")
    try:
        return factory(**{key: value for key, value in arguments.items() if every or key in named})
    except BaseException as error:
        pass_on(error)
        raise ValueError(f"--model {plain}: the factory raised {raised(error)}") from error


def raised(error: BaseException) -> str:
    """What a user's code raised, SystemExit for example, and where in it."""
    return f"{type(error).__name__}: {reason(error)}{_place(error)}"


def defined(function: Any) -> str:
    """Where a function of a user's module begins, as " (file.py, line 3)"; empty if nowhere."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""


def pass_on(error: BaseException) -> None:
    """Raise `error` where it is no fault of the code that raised it: an interrupt, or memory that ran out."""
    if isinstance(error, KeyboardInterrupt) or is_out_of_memory(error):
        raise error


def _place(error: BaseException) -> str:
    """Where in a file that is neither Python's nor installed nor ours, as " (file.py, line 3)"; empty if nowhere."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    frames = [f for f in frames if not Path(f.filename).resolve().is_relative_to(_OURS)]
    own = [f for f in frames if not _installed(f.filename)]
    own = own or [f for f in frames if "site-packages" in f.filename and f"{os.sep}torch{os.sep}" not in f.filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _installed(file: str) -> bool:
    return "site-packages" in file or Path(file).resolve().is_relative_to(_PYTHONS)
