"""The finished cases of an unfinished run, kept beside its report, so that `--resume` redoes at most one."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

import phase1
from phase1.files import atomic_write, read_json, remove
from phase1.text import one_line

T = TypeVar("T")
VERSION: Final = 1
SUFFIX: Final = ".partial.json"
START_OVER: Final = "leave out --resume to start over"


class Journal:
    """Finished cases by name, kept in a file at `path` from the first finished case until `close`.

    `identity` is what a case depends on, by part ("config", "code", "data", "machine"); only cases of an equal identity
    are used again.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], cases: Mapping[str, Any]) -> None:
        self.path, self._identity, self._cases = path, dict(identity), dict(cases)

    def case(self, name: str, kind: Any, compute: Callable[[], T]) -> T:
        """The value of case `name`: the one that an earlier run kept, else `compute()`, which is then kept.

        Args:
            kind: the type of the value, for example `MemoryResult`; anything that pydantic can write and read.
        Raises:
            ValueError: the kept value is not of type `kind`. OSError: the file cannot be written.
        """
        adapter = TypeAdapter(kind)
        if name in self._cases:
            try:
                return adapter.validate_json(json.dumps(self._cases[name]), strict=True)
            except ValidationError as error:
                first = error.errors()[0]
                got = one_line(f"{first['msg']} at {'.'.join(map(str, first['loc']))}")
                raise ValueError(
                    f"{one_line(self.path)}: expected a finished case {one_line(name)}; got {got}; {START_OVER}"
                ) from error
        value = compute()
        self._cases[name] = adapter.dump_python(value, mode="json")
        content = {"journal_version": VERSION, "identity": self._identity, "cases": self._cases}
        atomic_write(self.path, (json.dumps(content, allow_nan=False) + "\n").encode())
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._cases

    def close(self) -> None:
        """Remove the file, once the report holds every case."""
        remove(self.path)


def open_journal(
    report: Path, settings: Mapping[str, Any], *, machine: Mapping[str, Any], resume: bool, data: Any = None
) -> Journal:
    """The journal of the run that writes `report`.

    With `resume` it holds the finished cases of an earlier run, if there was one. Without, it is empty, and an earlier run's
    file stays as it is until the first case of this one is finished.

    Args:
        settings: those that a case depends on (`phase1.machine.environment.deciding_settings`).
        machine: facts of hardware and software, so that no report joins numbers of two machines.
        data: what identifies the data, as JSON; None if no case depends on any.
    Raises:
        ValueError: one line, if the earlier run differs in config, code, data or machine, or its journal is damaged.
    """
    path = report.with_name(report.name.removesuffix(".json") + SUFFIX)
    identity = json.loads(json.dumps({"config": dict(settings), "code": code_sha256(), "data": data, "machine": dict(machine)}))
    if not path.exists():
        return Journal(path, identity, {})
    if not resume:
        print(
            f"{one_line(path)}: of an unfinished run, replaced by this run's first finished case; --resume would go on with it",
            file=sys.stderr,
        )
        return Journal(path, identity, {})
    return Journal(path, identity, _cases_of(path, identity))


def code_sha256() -> str:
    """SHA-256 over name and content of every Python file of this package."""
    package = Path(phase1.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _cases_of(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = read_json(path)
        if not isinstance(content, dict) or content.keys() != {"journal_version", "identity", "cases"}:
            raise ValueError("the file of another program")
        if content["journal_version"] != VERSION:
            raise ValueError(f"journal_version {content['journal_version']!r:.40}")
        if not isinstance(content["identity"], dict) or not isinstance(content["cases"], dict):
            raise ValueError("no objects named identity and cases")
    except ValueError as error:
        raise ValueError(
            f"{one_line(path)}: expected a journal of version {VERSION}; got {one_line(error)}; {START_OVER}"
        ) from error
    for part, expected in identity.items():
        if content["identity"].get(part) != expected:
            got = one_line(_difference(part, content["identity"].get(part), expected))
            raise ValueError(
                f"{one_line(path)}: expected a run with the same {part}; got {got}; go back to it, or {START_OVER}"
            )
    return content["cases"]


def _difference(part: str, old: Any, new: Any) -> str:
    """The first flag or fact that differs; of two digests only that they differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{part} that has changed since"
    name = next(key for key in {**new, **old} if key not in old or key not in new or old[key] != new[key])
    spelling = f"--{name.replace('_', '-')}" if part == "config" else name
    return f"{spelling} {old.get(name)} then and {new.get(name)} now"
