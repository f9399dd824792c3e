"""The command line: every flag, default and help text comes from a config dataclass."""

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from phase1 import __version__, runs
from phase1.config import Config, to_toml
from phase1.errors import FAILURES, error_line, exit_status
from phase1.presets import PRESETS
from phase1.text import one_line

COMMANDS: dict[str, type[Config]] = {
    "memory": runs.MemoryRun,
    "throughput": runs.ThroughputRun,
    "perplexity": runs.PerplexityRun,
    "tables": runs.TablesRun,
    "compare": runs.CompareRun,
    "pipeline": runs.PipelineRun,
    "train": runs.TrainRun,
    "generate": runs.GenerateRun,
    "export": runs.ExportRun,
    "doctor": runs.DoctorRun,
}
EXIT_STATUS = (
    "exit status: 0 every check passes, 1 a check fails, 2 wrong usage or input, 3 undecided or unavailable, "
    "4 a file cannot be written, 130 interrupted"
)


class _Parser(argparse.ArgumentParser):
    """Errors are one line that ends with where to look, without the usage block in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}; see {self.prog} --help", 2000) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else None
    if name is None:
        return _top_level(argv)
    try:
        run = parse(name, argv[1:])
        return _run(name, run)
    except KeyboardInterrupt:
        kept = "; older results are untouched" if name != "generate" else ""
        again = "; --resume goes on with what is finished" if hasattr(COMMANDS[name], "resume") else ""
        again = "; the same command goes on from its checkpoint" if name == "train" else again
        print(f"phase1 {name}: interrupted{kept}{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except tuple(FAILURES) as error:
        print(error_line(name, error), file=sys.stderr)
        return exit_status(error)


def _run(name: str, run: Config) -> int:
    """The exit status of a command. What it imports is no garbage: to look through it, over and over, takes seconds."""
    gc.disable()
    try:
        command = importlib.import_module(f"phase1.commands.{name}")
        gc.freeze()
    finally:
        gc.enable()
    try:
        return int(command.main(run))
    finally:
        gc.unfreeze()


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
    """`argv` as the config of `command`: a flag wins over the file, the file over the preset, the preset over the default.

    Raises SystemExit(2) for unknown flags and values of the wrong type, SystemExit(0) after --print-config has printed, and
    ValueError for values out of range and files that cannot be read.
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
        parser.add_argument(_spelling(field), help=field.metadata["help"], **_argument(field))
    parser.add_argument("--config", metavar="FILE", help="TOML file of these flags, without their dashes in front; flags win")
    parser.add_argument("--print-config", action="store_true", help="print such a file, with where each value is from, and end")
    first = parser.parse_args(argv)
    from_file = [] if first.config is None else _words(first.config, parser, cls)
    values = vars(parser.parse_args([*from_file, *argv]))
    preset = values["preset"] if presets else None
    if preset is not None:
        parser.set_defaults(**PRESETS[preset][command])
        values = vars(parser.parse_args([*from_file, *argv]))
    names = [field.name for field in fields(cls)]
    run = cls(**{name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names})
    if first.print_config:
        origins = dict.fromkeys(PRESETS[preset][command], f"preset {preset}") if preset else {}
        origins |= dict.fromkeys(_given(parser, from_file, names), one_line(first.config))
        origins |= dict.fromkeys(_given(parser, argv, names), "flag")
        print(to_toml(run, dict.fromkeys(names, "default") | origins), end="")
        parser.exit(0)
    return run


def _words(path: str, parser: _Parser, cls: type[Config]) -> list[str]:
    """The flags in the TOML file at `path`, as words of a command line."""
    import tomllib  # of a few runs only

    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config must be a readable TOML file; got {path} ({one_line(error)}); correct it") from error
    known = {field.name: field for field in fields(cls) if not field.metadata.get("positional")}
    words = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name == "preset":
            words += ["--preset", str(value)]
        elif name not in known:
            nearest = get_close_matches(key, [k.replace("_", "-") for k in known], n=1, cutoff=0)[0]
            parser.error(f"{one_line(path)}: no flag is called {key}; the nearest is {nearest}")
        elif known[name].type is bool and isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif isinstance(value, list):
            words += [_spelling(known[name]), *map(str, value)] if value else []
        else:
            words.append(f"{_spelling(known[name])}={value}")
    return words


def _given(parser: _Parser, argv: Sequence[str], names: list[str]) -> list[str]:
    """Those of `names` that `argv` has a value for."""
    nothing = object()
    values = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, nothing)))
    return [name for name in names if getattr(values, name) is not nothing]


def _spelling(field: Any) -> str:
    return field.name if field.metadata.get("positional") else "--" + field.name.replace("_", "-")


def _argument(field: Any) -> dict[str, Any]:
    """What argparse needs to know of a dataclass field."""
    if field.metadata.get("positional"):
        return {"type": field.type, "metavar": field.name.upper()}
    kind, options = field.type, {"default": field.default}
    if field.default is MISSING:
        options = {"required": True}
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is UnionType:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        options["nargs"] = "+"
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    return options | {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
