"""Writes docs/reference.md and docs/ja/reference.md: every flag, preset and field, from the program itself.

    python docs/reference.py

English comes from the help of the flags and the descriptions of the fields; docs/reference.toml has the Japanese, and the
English of fields that have no description.
"""

import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
sys.path[:0] = [] if "phase1" in sys.modules else [str(ROOT / "src")]

from phase1.cli import COMMANDS, GROUPS  # noqa: E402
from phase1.config import Config, flag_of  # noqa: E402
from phase1.presets import PRESETS  # noqa: E402
from phase1.records import schema  # noqa: E402
from phase1.records.metrics import FIELDS, METRICS  # noqa: E402

WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PAGES = {"en": ROOT / "docs" / "reference.md", "ja": ROOT / "docs" / "ja" / "reference.md"}
MODELS: tuple[type[BaseModel], ...] = (
    schema.Report, schema.Check, schema.Result, schema.Parameters, schema.Execution, schema.MemoryResult, schema.MemoryTimeline,
    schema.Fit, schema.FitProbe, schema.Ablation, schema.ThroughputResult, schema.Measurement, schema.Scaling, schema.Decoding,
    schema.DecodePoint, schema.PerplexityResult, schema.Dataset, schema.LossPart,
)  # fmt: skip


def declared() -> dict[type[Config], list[str]]:
    """The commands that have the flags of every class that declares some: shared classes first, then those of one command."""
    users: dict[type[Config], list[str]] = {}
    for command, run in COMMANDS.items():
        for name in (field.name for field in fields(run)):
            users.setdefault(declaring(run, name), []).append(command)
    shared = [cls for cls in GROUPS if cls in users]
    return {cls: list(dict.fromkeys(users[cls])) for cls in [*shared, *(cls for cls in users if cls not in shared)]}


def declaring(run: type[Config], name: str) -> type[Config]:
    """The class of `run`'s ancestry whose declaration of the field counts."""
    return next(base for base in run.__mro__ if name in base.__dict__.get("__annotations__", {}))


def own_fields(cls: type[Config]) -> Iterator[Any]:
    return (field for field in fields(cls) if field.name in cls.__dict__.get("__annotations__", {}))


def page(language: str) -> str:
    """The whole reference in `en` or `ja`. Raises ValueError, which names it, for a line that docs/reference.toml lacks."""
    say = WORDS[language]
    parts = [say["head"], f"## {say['flags']}\n\n{say['of_all']}\n"]
    for cls, commands in declared().items():
        own = list(own_fields(cls))
        title = say["groups"].get(cls.__name__) or f"`phase1 {commands[0]}`"
        parts.append(f"### {title}\n\n{_about(cls, commands, language)}\n")
        parts += [_table(say["flag_heads"], [_flag(cls, field, language) for field in own])] if own else []
    parts.append(f"## {say['presets']}\n\n{say['of_presets']}\n")
    parts.append(_table(say["preset_heads"], list(_presets())))
    parts.append(f"## {say['fields']}\n\n{say['of_fields']}\n")
    for model in MODELS:
        inherited = {name for base in model.__mro__[1:] for name in getattr(base, "model_fields", {})}
        rows = [_field(model, name, language) for name in model.model_fields if name not in inherited]
        parts.append(f"### {model.__name__}\n\n{_model_text(model, language)}\n\n{_table(say['field_heads'], rows)}")
    parts.append(f"### {METRICS}\n\n{say['of_metrics']}\n")
    parts.append(_table(say["field_heads"][::2], [[f"`{name}`", say["metrics"][name]] for name in FIELDS]))
    return "\n".join(parts)


def _about(cls: type[Config], commands: list[str], language: str) -> str:
    say = WORDS[language]
    if cls.__name__ in say["groups"]:
        return say["used_by"].format(commands=say["comma"].join(f"`{command}`" for command in commands))
    return say["commands"][commands[0]] if language != "en" else " ".join((cls.__doc__ or "").split())


def _flag(cls: type[Config], field: Any, language: str) -> list[str]:
    """A row: the flag with its other spellings, its default, what it means and which values it can have."""
    say = WORDS[language]
    names = [field.name.upper()] if field.metadata.get("positional") else [flag_of(field.name)]
    names += [flag_of(name) for name in field.metadata.get("spellings", ())]
    names += [flag_of(f"no_{field.name}")] if bool in _types(field.type) else []
    help = field.metadata["help"] if language == "en" else _line(language, "flag", cls.__name__, field.name)
    choices = [str(item) for part in _literals(field.type) for item in get_args(part)]
    values = f" ({say['one_of']} {say['comma'].join(f'`{c}`' for c in choices)})" if choices else ""
    shown = say["comma"].join(f"`{name}`" for name in names)
    return [shown, _default(field.default, say), help.replace("%%", "%") + values]


def _default(value: Any, say: dict[str, Any]) -> str:
    if value is MISSING:
        return str(say["needed"])
    if value is None or value in ("", ()):
        return "–"
    if isinstance(value, bool):
        return str(say["on"] if value else say["off"])
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _types(kind: Any) -> list[Any]:
    """`kind`, or what it is a union of."""
    return list(get_args(kind)) if get_origin(kind) in (types.UnionType, Union) else [kind]


def _literals(kind: Any) -> list[Any]:
    """The Literal types in `kind`."""
    if get_origin(kind) is Literal:
        return [kind]
    return [found for part in get_args(kind) for found in _literals(part)]


def _presets() -> Iterator[list[str]]:
    """What every preset says beyond the defaults, command by command."""
    for name, commands in PRESETS.items():
        for command, values in commands.items():
            flags = [f"`{flag_of(key)} {_default(value, WORDS['en'])}`" for key, value in values.items()]
            yield [f"`{name}`", f"`{command}`", " ".join(flags) or "–"]


def _field(model: type[BaseModel], name: str, language: str) -> list[str]:
    info = model.model_fields[name]
    described = language == "en" and info.description is not None
    text = info.description if described else _line(language, "field", model.__name__, name)
    return [f"`{name}`", f"`{_type_name(info.annotation)}`", text]


def _line(language: str, part: str, owner: str, name: str) -> str:
    """What docs/reference.toml says of a flag or field."""
    text = WORDS[language][part].get(owner, {}).get(name)
    if text is None:
        remedy = f"add a line {name} = under [{language}.{part}.{owner}]"
        raise ValueError(f"docs/reference.toml must say what {owner}.{name} is; got nothing; {remedy}")
    return str(text)


def _model_text(model: type[BaseModel], language: str) -> str:
    return WORDS[language]["model"][model.__name__] if language != "en" else " ".join((model.__doc__ or "").split())


def _type_name(kind: Any) -> str:
    """A type as JSON sees it, in Python's words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin in (types.UnionType, Union):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is not None:
        name = {tuple: "list", dict: "object"}.get(origin, getattr(origin, "__name__", str(origin)))
        inside = parts[1:] if origin is dict else tuple(dict.fromkeys(parts))
        named = ", ".join(_type_name(part) for part in inside if part is not Any)
        return f"{name} of {named}" if named else name
    known = {str: "text", bool: "true or false", int: "integer", float: "number", Any: "any"}
    return known.get(kind) or ("Result" if not isinstance(kind, type) else kind.__name__)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def main() -> None:
    """Write both pages."""
    for language, path in PAGES.items():
        path.write_text(page(language), encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
