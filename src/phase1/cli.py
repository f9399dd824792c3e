"""The command line: every flag, default and help text comes from a config dataclass."""

import argparse
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from phase1 import __version__, config, runs, world
from phase1.config import Config, to_toml
from phase1.errors import Elsewhere, Gone, Unavailable, report_failure
from phase1.factory import raised
from phase1.presets import PRESETS
from phase1.signals import Ending, ending_signals_interrupt
from phase1.text import one_line, printable_output, standard_streams

COMMANDS: dict[str, type[Config]] = {
    "memory": runs.MemoryRun,
    "throughput": runs.ThroughputRun,
    "perplexity": runs.PerplexityRun,
    "tables": runs.TablesRun,
    "report": runs.ReportRun,
    "compare": runs.CompareRun,
    "curves": runs.CurvesRun,
    "pipeline": runs.PipelineRun,
    "train": runs.TrainRun,
    "generate": runs.GenerateRun,
    "export": runs.ExportRun,
    "check-model": runs.CheckModelRun,
    "doctor": runs.DoctorRun,
}
UNDECIDED = 3  # the exit status of a report that has no failed check, and one that is undecided
TOGETHER = ("memory", "throughput", "perplexity", "train")  # commands that run on many GPUs, started by torchrun
GROUPS: dict[type[Config], str] = {
    config.ModelShape: "model",
    config.EngineShape: "model",
    config.ModelConfig: "model",
    config.DataConfig: "data",
    config.TrainConfig: "training",
    config.WatchConfig: "watching",
    runs.ComparisonConfig: "comparison",
    runs.OutputConfig: "output",
}
"""Heading of the flags that a class declares; those of the command itself come first, under its name."""
EXAMPLES = {
    "memory": ("phase1 memory", 'phase1 memory --card "RTX 3060" --fit', "phase1 memory --batch-size 2 --ablate"),
    "throughput": ("phase1 throughput --save-plots", "phase1 throughput --preset smoke", "phase1 throughput --compile --a-a"),
    "perplexity": (
        "phase1 perplexity --preset smoke",
        "phase1 perplexity --dataset-name c4 --max-samples 1000",
        "phase1 perplexity --checkpoint results/checkpoints/train",
    ),
    "tables": ("phase1 tables", "phase1 tables --results-dir results/validate --formats csv", "phase1 tables --results-page"),
    "report": ("phase1 report", "phase1 report --results-dir results/validate --against results/before"),
    "compare": ("phase1 compare old new --fail-on peak:+2%,tokens_per_second:-5%",),
    "curves": ("phase1 curves results/checkpoints/train results/checkpoints/longer",),
    "pipeline": ("phase1 pipeline --preset smoke", "phase1 pipeline --preset rtx3080-10g --resume"),
    "train": ("phase1 train --preset smoke", "phase1 train --dataset-name my.txt --tokenizer bpe --vocab-size 8192"),
    "generate": (
        'phase1 generate --checkpoint results/checkpoints/train --prompt "The "',
        "phase1 generate --checkpoint results/checkpoints/train --prompt-file - --temperature 0",
    ),
    "export": ("phase1 export --checkpoint results/checkpoints/train",),
    "check-model": ("phase1 check-model mine=my_model:build",),
    "doctor": ("phase1 doctor",),
}
ELSEWHERE = {
    "--lr": ("--learning-rate",),
    "--epochs": ("--train-tokens",),
    "--steps": ("--train-tokens",),
    "--max-steps": ("--train-tokens",),
    "--batch": ("--train-batch-size", "--batch-size"),
    "--bs": ("--train-batch-size", "--batch-size"),
    "--data": ("--dataset-name",),
    "--dataset": ("--dataset-name",),
    "--output": ("--out-dir",),
    "--output-dir": ("--out-dir",),
    "--device": ("--card",),
    "--model-path": ("--checkpoint",),
}
"""What other tools call a flag."""
COMMAND_LINE_ONLY = ("config", "print_config", "help")  # no keys of a file
START = """start here:
  phase1 doctor                             what this machine can do
  phase1 memory --card "RTX 3060" --fit     what trains on a card; needs no GPU
  phase1 pipeline --preset smoke            everything at small sizes, some minutes on a CPU
"""
EXIT_STATUS = (
    "exit status: 0 every check passes, 1 a check fails, 2 wrong usage or input, 3 undecided or unavailable, "
    "4 a file cannot be written, 5 an internal error, 130 interrupted"
)


class _Parser(argparse.ArgumentParser):
    """Errors are one line that ends with where to look, without the usage block in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}; see {self.prog} --help", 2000) + "\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults as they are typed on the command line, and nothing for a flag without one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, (), argparse.SUPPRESS) or isinstance(action.default, bool):
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status, also that of --help and of wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else None
    with standard_streams(), printable_output(), world.first_speaks(), ending_signals_interrupt() as ending:
        try:
            return _top_level(argv) if name is None else _status(name, argv[1:], ending)
        except SystemExit as ended:  # argparse has printed what there is to say
            return int(ended.code or 0)


def _status(name: str, argv: Sequence[str], ending: Ending) -> int:
    """The exit status of a command, whatever ends it."""
    run: Config | None = None
    try:
        run = parse(name, argv)
        return _run(name, run, ending)
    except BrokenPipeError:  # the reader of the output, for example `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Elsewhere, Gone) as error:  # whatever signal torchrun has sent: it sends one when a rank ends
        return report_failure(name, error)
    except (Exception, KeyboardInterrupt) as error:
        if not ending.come and not isinstance(error, KeyboardInterrupt):
            return report_failure(name, error)
        kept = "; older results are untouched" if name != "generate" else ""
        again = "; --resume goes on with what is finished" if hasattr(COMMANDS[name], "resume") else ""
        if isinstance(run, runs.TrainRun):
            saved = os.path.exists(os.path.join(run.out_dir, "checkpoint.json"))
            again = "; the same command goes on from its checkpoint" if saved else "; there is no checkpoint yet"
        print(f"phase1 {name}: interrupted{kept}{again}", file=sys.stderr)
        return 130


def _run(name: str, run: Config, ending: Ending) -> int:
    """Run a command and return its exit status.

    The garbage collector is off while the command imports, and the imported objects are frozen: scanning PyTorch's millions of
    objects at every collection costs seconds.
    """
    # On a busy machine, threads that spin while they wait take the cores from the ones that work. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.disable()
    try:
        with ending.waiting():
            if world.size() > 1 and name in TOGETHER:
                importlib.import_module("phase1.parallel.run").see_one_gpu()  # before a module asks CUDA for anything
            command = importlib.import_module(f"phase1.commands.{name.replace('-', '_')}")
        gc.freeze()
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    finally:
        gc.enable()
    try:
        if world.size() == 1:
            return int(command.main(run))
        return _run_together(name, command.main, run)
    except ModuleNotFoundError as error:  # of those that are imported where they are needed
        raise _not_installed(error) from error
    except SystemExit as error:  # of a user's backward pass, say: no command of ours ends so, and it may claim success
        raise ValueError(f"--model must return; got {raised(error)}; raise an Exception in its place") from error
    finally:
        gc.unfreeze()


def _run_together(name: str, command: Callable[[Any], int], run: Config) -> int:
    """The exit status of a command that all processes of torchrun run; torchrun knows success and failure alone, and a
    report whose checks are undecided is no failure."""
    if name not in TOGETHER:
        raise ValueError(f"phase1 {name} runs in one process; got {world.size()} of torchrun; start it without torchrun")
    from phase1.parallel.run import processes  # it takes PyTorch

    with processes(name):
        status = command(run)
        return 0 if status == UNDECIDED else status


def _not_installed(error: ModuleNotFoundError) -> Exception:
    """Report a missing package in one line; a missing module of phase1 itself is an internal error."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "phase1"):
        return error
    return Unavailable(
        f"the Python package {package} is not installed; run: pip install {package}, or pip install -e . for all"
    )


def _top_level(argv: list[str]) -> int:
    about = "Phase 1 Efficiency Engine: an O(N) language model and its validation."
    parser = _Parser(prog="phase1", description=about, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"phase1 {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, cls in COMMANDS.items():
        commands.add_parser(name, help=_summary(cls), add_help=False)
    parser.epilog = f"{START}\nphase1 COMMAND --help explains a command.\n{EXIT_STATUS}"
    if not argv:
        parser.print_help()
        return 0
    if near := get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.6):
        parser.error(f"no command is called {argv[0]}; did you mean {near[0]}?")
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
        usage=" ".join(["%(prog)s", *(f.name.upper() for f in fields(cls) if f.metadata.get("positional")), "[flags]"]),
        description=cls.__doc__,
        epilog="\n".join(["examples:", *(f"  {example}" for example in EXAMPLES[command]), "", EXIT_STATUS]),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    presets = [name for name, commands in PRESETS.items() if command in commands]
    if presets:
        parser.add_argument("--preset", choices=presets, default=None, help="defaults for a card; other flags win over it")
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys((command, *GROUPS.values()))}
    for field in fields(cls):
        groups[_group(cls, field.name, command)].add_argument(
            *_spellings(field), help=field.metadata["help"], **_argument(field)
        )
        for flag, value in _switches(field).items():
            parser.add_argument(flag, dest=field.name, action="store_const", const=value, help=argparse.SUPPRESS)
    settings = groups[command]
    settings.add_argument("--config", metavar="FILE", help="TOML file of these flags, without their dashes in front; flags win")
    settings.add_argument(
        "--print-config", action="store_true", help="print such a file, with where each value is from, and end"
    )
    first = _known(parser, argv)
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
    kinds = {name: field.type for name, field in known.items()} | {"preset": str}
    kinds |= {flag.removeprefix("--").replace("-", "_"): bool for field in known.values() for flag in _switches(field)}
    words = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in COMMAND_LINE_ONLY:
            raise ValueError(f"{one_line(path)}: the key {key} is not allowed in a file; remove it, or give --{key} itself")
        if name not in kinds:
            nearest = get_close_matches(key, [k.replace("_", "-") for k in known], n=1, cutoff=0)[0]
            parser.error(f"{one_line(path)}: no flag is called {key}; the nearest is {nearest}")
        if (expected := _misfit(value, kinds[name])) is not None:
            got = one_line(json.dumps(value, ensure_ascii=False, default=str), 80)
            raise ValueError(f"{one_line(path)}: {key} must be {expected}; got {got}; correct it")
        if kinds[name] is bool:
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif name == "preset":
            words += ["--preset", value]
        elif isinstance(value, list):
            words += [_spellings(known[name])[0], *map(str, value)] if value else []
        else:
            words.append(f"{_spellings(known[name])[0]}={value}")
    return words


def _misfit(value: Any, kind: Any) -> str | None:
    """What a value of a file must be to set a field of type `kind`, where it is not that."""
    if get_origin(kind) is UnionType:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        expected = next((misfit for item in _items(value) if (misfit := _misfit(item, kind)) is not None), None)
        return None if expected is None else f"a list, and in it {expected}"
    if get_origin(kind) is Literal:
        return None if isinstance(value, str) and value in get_args(kind) else f"one of {', '.join(map(repr, get_args(kind)))}"
    is_number = type(value) in (int, float)
    fits, expected = {
        bool: (isinstance(value, bool), "true or false"),
        int: (is_number and value == value // 1, "a whole number"),
        float: (is_number, "a number"),
        str: (isinstance(value, str), "a string"),
    }[kind]
    return None if fits else expected


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _given(parser: _Parser, argv: Sequence[str], names: list[str]) -> list[str]:
    """The fields among `names` that `argv` sets."""
    nothing = object()
    values = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, nothing)))
    return [name for name in names if getattr(values, name) is not nothing]


def _known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The parsed flags; SystemExit(2) for an unknown one, with those that look like it."""
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [spelling for action in parser._actions for spelling in action.option_strings]
        given = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        plain = given.replace("_", "-")
        near = [flag for flag in flags if flag.startswith(plain)] if len(plain) > 3 else []
        near = [flag for flag in ELSEWHERE.get(plain, ()) if flag in flags] or near
        near = near or get_close_matches(plain, flags, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near[:2])}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return values


def _group(cls: type[Config], name: str, command: str) -> str:
    """The heading under which --help shows a flag: by the class that declares it, else the command's own."""
    declaring = next(base for base in cls.__mro__ if name in base.__dict__.get("__annotations__", {}))
    return GROUPS.get(declaring, command)


def _spellings(field: Any) -> list[str]:
    if field.metadata.get("positional"):
        return [field.name]
    return ["--" + name.replace("_", "-") for name in (field.name, *field.metadata.get("spellings", ()))]


def _switches(field: Any) -> dict[str, Any]:
    """The flags that a field was when it was on or off, and their values."""
    if not field.metadata.get("switch"):
        return {}
    name, on, off = field.metadata["switch"]
    flag = name.replace("_", "-")
    return {f"--{flag}": on, f"--no-{flag}": off}


def _argument(field: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a dataclass field."""
    if field.metadata.get("positional"):
        several = {"nargs": "+"} if get_origin(field.type) is tuple else {}
        return {"type": str, "metavar": field.name.upper()} | several
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
    return options | {"type": {int: integer}.get(kind, kind), "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}


def integer(text: str) -> int:
    """A whole number, also as 1e6. Raises ValueError for other text."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
