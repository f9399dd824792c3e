"""Data sets of the Hugging Face hub: found online or in the local cache, read without surprises."""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase1.data.text import Document, Text
from phase1.errors import Unavailable
from phase1.text import one_line

SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}
FORMER_NAMES = {"Salesforce/wikitext": ("wikitext",), "allenai/c4": ("c4",)}
"""Old names of repositories: `load_dataset` of such a name, as in older tutorials, fills the cache under it."""
STREAM_RETRIES = {"MAX_RETRIES": 3, "INTERVAL": 1}  # the library's own wait minutes before they report a lost network


@dataclass(frozen=True)
class HubSet:
    """A data set by its repository, and how its rows become documents."""

    repository: str
    config: str | None
    files: str = ""  # the part to download of a set that is too large as a whole
    lines: bool = False  # rows are the lines of one document, else each row is one

    @property
    def command(self) -> str:
        """The shell command that puts the set into the local cache."""
        return f"hf download --repo-type dataset {self.repository}{self.files}"


def hub_set(name: str, config: str | None) -> HubSet:
    """The set that `--dataset-name` and `--dataset-config` mean; the names of old tutorials are today's repositories.

    Raises ValueError for a name that is neither known nor owner/name, and for a configuration of another set.
    """
    if name in ("wikitext", "Salesforce/wikitext"):
        config = config or "wikitext-103-raw-v1"
        known = ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
        if config not in known:
            raise ValueError(f"--dataset-config of {name} must be one of {', '.join(known)}; got {config}; choose one")
        return HubSet("Salesforce/wikitext", config, lines=True)
    if name in ("c4", "allenai/c4"):
        config = config or "en"
        if config.startswith("wikitext"):
            raise ValueError(f"--dataset-config of {name} must be one of its own; got {config}; try --dataset-config en")
        first = f"{config}/c4-train.00000-of-01024.json.gz {config}/c4-validation.00000-of-00008.json.gz"
        return HubSet("allenai/c4", config, files=f" README.md {first}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"--dataset-name must be wikitext, c4, builtin, an existing path or a hub repository owner/name; got {name}; "
            "check the spelling"
        )
    return HubSet(name, config)


def go_offline() -> None:
    """Keep the libraries of the hub off the network for the rest of this process, loaded already or not."""
    os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"))
    for loaded in ("huggingface_hub.constants", "datasets.config"):
        if loaded in sys.modules:
            sys.modules[loaded].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def hub_client() -> Any:
    """The package huggingface_hub. Raises ValueError, one line, for variables of the environment that it stumbles over."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if not os.environ.get(name, "").isascii():
            raise ValueError(
                f"the variable {name} must hold ASCII letters and digits; got others; copy the token again, or unset it"
            )
    try:
        import huggingface_hub.constants  # which reads them
    except ValueError as error:
        names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
        expected = f"the variables {names} must be as huggingface_hub reads them"
        raise ValueError(f"{expected}; got {one_line(error)}; correct or unset them") from error
    return huggingface_hub


def hub_texts(wanted: HubSet, need: tuple[str, ...], *, offline: bool = False) -> tuple[str, dict[str, Text]]:
    """(commit hash, text of each needed split). Documents are read when they are asked for, inside `quiet()`.

    A set that is read by lines (WikiText) is downloaded and checked as a whole; any other is streamed. With `offline` only
    the local cache is looked at (call `go_offline` first).
    Raises Unavailable where hub and local cache fail, ValueError for an unknown repository, configuration or split.
    """
    try:
        import datasets
    except ImportError as error:
        missing = "the package datasets is not installed; run `pip install 'datasets>=3.0'`"
        raise Unavailable(_unreachable(wanted, missing)) from error
    place, revision = _in_cache(wanted, "--offline, and it is not in the local cache") if offline else _locate(wanted)
    remote = {"revision": revision} if place == wanted.repository else {}
    with _one_line_errors(wanted):
        loaded = datasets.load_dataset(place, wanted.config, streaming=not wanted.lines, **remote)
    return revision, {split: _text(wanted, revision, loaded, split) for split in need}


def _locate(wanted: HubSet) -> tuple[str, str]:
    """(what load_dataset opens, commit hash): the repository where the hub answers, else its copy in the cache."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # asked first, because it fails in a moment where load_dataset retries for half a minute and prints each try
        info = huggingface_hub.HfApi().dataset_info(wanted.repository, timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError as error:
        raise Unavailable(_unreachable(wanted, "access must be granted on the hub and `hf auth login` run first")) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"--dataset-name must be a data set of the hub; got {wanted.repository}, unknown there; check the spelling"
        ) from error
    except _transport_errors() as error:
        return _in_cache(wanted, _cause(error))
    return wanted.repository, str(info.sha)


def _in_cache(wanted: HubSet, cause: str) -> tuple[str, str]:
    """(folder or name, commit hash) of the copy in the local cache; Unavailable, with the `cause` of looking there, without.

    That of `hf download`, under any name the repository has had, or what `load_dataset` has prepared under a former one.
    """
    import huggingface_hub

    for repository in (wanted.repository, *FORMER_NAMES.get(wanted.repository, ())):
        card = huggingface_hub.try_to_load_from_cache(repository, "README.md", repo_type="dataset")
        if isinstance(card, str):
            return str(Path(card).parent), Path(card).parent.name
    for name in FORMER_NAMES.get(wanted.repository, ()):
        if (commit := _prepared(name, wanted.config)) is not None:
            go_offline()  # the library would ask the hub first, which does not answer
            return name, commit
    raise Unavailable(_unreachable(wanted, cause))


def _prepared(name: str, config: str | None) -> str | None:
    """Commit hash of the newest form of a data set that `load_dataset(name, config)` has left behind, if it has."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / name / (config or "default")
    found = [path.parent for path in folder.glob("*/*/dataset_info.json")]
    return max(found, key=lambda path: path.stat().st_mtime).name if found else None


def _text(wanted: HubSet, revision: str, loaded: Any, split: str) -> Text:
    there = [name for name in SPLITS[split] if name in loaded]
    if not there:
        raise ValueError(
            f"{wanted.repository} ({wanted.config or 'default'}) must have a {split} split; got only {', '.join(loaded)}; "
            "choose another data set or configuration"
        )
    key = f"hub:{wanted.repository}@{revision}/{wanted.config or 'default'}/{there[0]}"
    rows = loaded[there[0]]
    if wanted.lines:
        return Text(key, lambda: iter([_wikitext_lines(wanted, rows)]))
    return Text(key, lambda: ([text] for text in _rows(wanted, rows)))


def _wikitext_lines(wanted: HubSet, rows: Any) -> Document:
    """The lines of the original file. The hub holds its blank lines, a space and a newline, as empty rows."""
    for text in _rows(wanted, rows):
        yield text or " \n"


def _rows(wanted: HubSet, rows: Any) -> Iterator[str]:
    with _one_line_errors(wanted):
        for row in rows:
            text = row.get("text")
            if not isinstance(text, str):
                raise ValueError(
                    f"{wanted.repository} must have a column named text; got {', '.join(row)}; choose another data set"
                )
            yield text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' logs, warnings and (off a terminal) progress bars, and shorten their retries, for a while.

    What goes wrong is said by the one error that is raised; everything is as before afterwards.
    """
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, disabled)
        try:
            hub_client()
            import datasets
        except ImportError:  # hub_texts says so
            yield
            return
        for action in ("OPEN", "READ"):
            for limit, value in STREAM_RETRIES.items():
                name = f"STREAMING_{action}_{limit if limit == 'MAX_RETRIES' else f'RETRY_{limit}'}"
                stack.callback(setattr, datasets.config, name, getattr(datasets.config, name))
                setattr(datasets.config, name, value)
        if not sys.stderr.isatty() and not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


@contextlib.contextmanager
def _one_line_errors(wanted: HubSet) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, *_transport_errors()) as error:
        raise Unavailable(_unreachable(wanted, _cause(error))) from error
    except ValueError as error:
        if str(error).startswith(wanted.repository):
            raise
        raise ValueError(
            f"{wanted.repository} with --dataset-config {wanted.config or 'of its own'}: {_cause(error)}"
        ) from error


def _transport_errors() -> tuple[type[BaseException], ...]:
    """What a request to the hub raises: OSError and the base error of the HTTP library that this hub client uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *HfHubHTTPError.__bases__


def _unreachable(wanted: HubSet, cause: str) -> str:
    known = wanted.repository in ("Salesforce/wikitext", "allenai/c4")
    return (
        f"no file or folder is called {wanted.repository} here, and the "
        * (not known)
        + f"data set {wanted.repository} ({wanted.config or 'default'}) cannot be reached: {cause}; download it first "
        f"where there is a network (`{wanted.command}`) or use --dataset-name builtin"
    )


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(f"{type(error).__name__}: {error}".rstrip(":. \n"))
