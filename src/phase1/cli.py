"""The command line: every flag, default and help text comes from a config dataclass."""

import argparse
import difflib
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from phase1 import __version__, runs
from phase1.config import Config
from phase1.errors import Unavailable, report_failure
from phase1.presets import PRESETS
from phase1.signals import Ending, ending_signals_interrupt
from phase1.text import one_line, printable_output

COMMANDS: dict[str, type[Config]] = {
    "memory": runs.MemoryRun,
    "throughput": runs.ThroughputRun,
    "perplexity": runs.PerplexityRun,
    "tables": runs.TablesRun,
    "compare": runs.CompareRun,
    "pipeline": runs.PipelineRun,
    "train": runs.TrainRun,
    "doctor": runs.DoctorRun,
}
EXIT_STATUS = (
    "exit status: 0 every check passes, 1 a check fails, 2 wrong usage or input, 3 undecided or unavailable, "
    "4 a file cannot be written, 5 an internal error, 130 interrupted"
)


class _Parser(argparse.ArgumentParser):
    """Errors are one line that ends with where to look, without the usage block in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}; see {self.prog} --help", 2000) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else None
    with printable_output(), ending_signals_interrupt() as ending:
        if name is None:
            return _top_level(argv)
        return _status(name, argv[1:], ending)


def _status(name: str, argv: Sequence[str], ending: Ending) -> int:
    """The exit status of a command, whatever ends it."""
    try:
        return _run(name, parse(name, argv), ending)
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if not ending.come and not isinstance(error, KeyboardInterrupt):
            return report_failure(name, error)
        again = "; --resume goes on with what is finished" if hasattr(COMMANDS[name], "resume") else ""
        again = "; the same command goes on from its checkpoint" if name == "train" else again
        print(f"phase1 {name}: interrupted; older results are untouched{again}", file=sys.stderr)
        return 130


def _run(name: str, run: Config, ending: Ending) -> int:
    """The exit status of a command. What it imports is no garbage: to look through it, over and over, takes seconds."""
    # On a busy machine, threads that spin while they wait take the cores from the ones that work. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.disable()
    try:
        with ending.waiting():
            command = importlib.import_module(f"phase1.commands.{name}")
        gc.freeze()
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    finally:
        gc.enable()
    try:
        return int(command.main(run))
    except ModuleNotFoundError as error:  # of those that are imported where they are needed
        raise _not_installed(error) from error
    finally:
        gc.unfreeze()


def _not_installed(error: ModuleNotFoundError) -> Exception:
    """One line in place of a traceback; a module of this package that is missing stays an error of ours."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "phase1"):
        return error
    return Unavailable(
        f"the Python package {package} is not installed; run: pip install {package}, or pip install -e . for all"
    )


def _top_level(argv: list[str]) -> int:
    parser = _Parser(prog="phase1", description="Phase 1 Efficiency Engine: an O(N) language model and its validation.")
    parser.add_argument("--version", action="version", version=f"phase1 {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, cls in COMMANDS.items():
        commands.add_parser(name, help=_summary(cls), add_help=False)
    parser.epilog = f"phase1 COMMAND --help explains a command. {EXIT_STATUS}"
    parser.parse_args(argv)
    return 2


def parse(command: str, argv: Sequence[str]) -> Any:
    """`argv` as the config of `command`: a flag wins over the preset, the preset over the default.

    Raises SystemExit(2) for unknown flags and values of the wrong type, ValueError for values out of range.
    """
    cls = COMMANDS[command]
    parser = _Parser(
        prog=f"phase1 {command}",
        description=cls.__doc__,
        epilog=EXIT_STATUS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    presets = [name for name, commands in PRESETS.items() if command in commands]
    if presets:
        parser.add_argument("--preset", choices=presets, default=None, help="defaults for a card; other flags win over it")
    for field in fields(cls):
        parser.add_argument(*_spellings(field), help=field.metadata["help"], **_argument(field))
    values = vars(_known(parser, argv))
    if presets and values["preset"] is not None:
        parser.set_defaults(**PRESETS[values["preset"]][command])
        values = vars(parser.parse_args(argv))
    if presets:
        del values["preset"]
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The parsed flags; SystemExit(2) for an unknown one, with those that look like it."""
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [spelling for action in parser._actions for spelling in action.option_strings]
        given = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        plain = given.replace("_", "-")
        near = [flag for flag in flags if flag.startswith(plain)] if len(plain) > 3 else []
        near = near or difflib.get_close_matches(plain, flags, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near[:2])}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return values


def _spellings(field: Any) -> list[str]:
    if field.metadata.get("positional"):
        return [field.name]
    return ["--" + name.replace("_", "-") for name in (field.name, *field.metadata.get("spellings", ()))]


def _argument(field: Any) -> dict[str, Any]:
    """What argparse needs to know of a dataclass field."""
    if field.metadata.get("positional"):
        return {"type": field.type, "metavar": field.name.upper()}
    kind, options = field.type, {"default": field.default}
    if field.default is MISSING:
        options = {"required": True}
    if get_origin(kind) is UnionType:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:
        options["nargs"] = "+"
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    return options | {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
