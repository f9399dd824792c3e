"""`load_corpus`: a data set's name in, token ids with their origin out."""

import contextlib
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phase1.config import DataConfig
from phase1.data.builtin import builtin_texts
from phase1.data.cache import cache_folder, cached_ids, ids_sha256
from phase1.data.hub import go_offline, hub_set, hub_texts, quiet
from phase1.data.local import file_text, local_files, read_token_file, require_text_name, split_file
from phase1.data.text import Text
from phase1.data.tokenizer_files import load_tokenizer, ready_tokenizer, tokenizer_kind
from phase1.data.tokenizers import Tokenizer
from phase1.text import printable_name

CHUNK = 1 << 22  # ids that are looked at together
STREAMED_VALID_TOKENS = 500_000  # valid and test of a streamed set are the first documents of more tokens than this


class NoSplit(ValueError):
    """A data set that is there has no such split."""


@dataclass(frozen=True)
class Split:
    """One part of a corpus as tokens."""

    name: str
    ids: np.ndarray
    """(N,) uint16 or uint32, end-of-text after every document (WikiText and text files: once, at the end)."""
    sha256: str
    """SHA-256 of the ids as little-endian uint32: equal for equal tokens, from text or from a token file."""


@dataclass(frozen=True)
class Corpus:
    """The splits that were asked for, and where they come from."""

    name: str
    """wikitext, c4, builtin, owner/name, or the last part of a local path."""
    source: str
    """Hub repository and configuration, local path as given, or builtin."""
    revision: str | None
    """Commit of a hub data set, version of the Python whose text builtin is, None for local files."""
    splits: dict[str, Split]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Origin:
    """The text that `--dataset-name` means, before it becomes tokens."""

    name: str
    source: str
    revision: str | None
    texts: dict[str, Text]
    token_files: dict[str, Path] = field(default_factory=dict)
    streamed: bool = False


def load_corpus(
    config: DataConfig,
    *,
    vocab_size: int,
    need: tuple[str, ...] = ("train", "valid"),
    train_tokens: int | None = None,
) -> Corpus:
    """The splits named in `need` (train, valid, test) of the data set and tokenizer of `config`.

    Args:
        vocab_size: V of the model; every id is below it. A `bpe` tokenizer is trained to this size.
        train_tokens: of a streamed set, read documents until there are more than this many tokens.
    Raises:
        ValueError: the user asks for something that is not there or not usable; never replaced by something else.
        phase1.errors.Unavailable: the data set or vocabulary cannot be reached from this machine.
    """
    unknown = set(need) - {"train", "valid", "test"}
    if unknown:
        raise ValueError(f"a split must be train, valid or test; got {', '.join(sorted(unknown))}; use one of these")
    if config.offline:
        go_offline()
    # a bpe is trained on the training text, also where only another split is evaluated
    kind = tokenizer_kind(config, vocab_size)
    wanted = tuple(dict.fromkeys((*need, "train"))) if kind == "bpe" else need
    tokenizer = None if kind == "bpe" else load_tokenizer(config, vocab_size, None)  # before the text, which may take hours
    with quiet() if _is_on_hub(config.dataset_name) else contextlib.nullcontext():
        origin = _open(config, wanted, tokenised=kind == "gpt2")
        tokenizer = tokenizer or load_tokenizer(config, vocab_size, origin.texts.get("train"))
        if origin.streamed and train_tokens is None and "train" in need:
            raise ValueError(f"{origin.source} is streamed: train_tokens must say how much to read; got None")
        splits = {name: _split(origin, name, tokenizer, config, train_tokens) for name in need}
    return Corpus(origin.name, origin.source, origin.revision, splits, tokenizer)


def check_names(config: DataConfig, *, vocab_size: int, need: tuple[str, ...] = ("train", "valid")) -> None:
    """Raise the ValueError of `load_corpus` for names that mean no data set or tokenizer; no text is read, no hub asked."""
    kind, path = tokenizer_kind(config, vocab_size), Path(config.dataset_name)
    if kind != "bpe" and (entries := ready_tokenizer(kind).vocab_size) > vocab_size:
        expected = f"--tokenizer {config.tokenizer} must have at most {vocab_size} entries, as the model"
        raise ValueError(f"{expected}; got {entries}; use --tokenizer bpe")
    _require_hub_for_configuration(config)
    if config.dataset_name == "builtin":
        return
    if _is_on_hub(config.dataset_name):
        hub_set(config.dataset_name, config.dataset_config)
    elif not path.is_dir():
        require_text_name(path)
    else:
        texts, tokens = local_files(path)
        there = {*texts, *(tokens if kind == "gpt2" else ())}
        for name in need:
            if name not in there:
                raise _no_split(printable_name(config.dataset_name), name, there, config)


def _no_split(source: str, name: str, found: set[str], config: DataConfig) -> NoSplit:
    there = ", ".join(sorted(found)) or "none that this tokenizer can read"
    return NoSplit(
        f"{source} must have a {name} split for --tokenizer {config.tokenizer}; got {there}; "
        f"add {name}.txt (or {name}.gpt2.bin for gpt2) to a folder, or choose another data set"
    )


def _require_hub_for_configuration(config: DataConfig) -> None:
    if config.dataset_config is not None and not _is_on_hub(config.dataset_name):
        expected = "--dataset-config needs a data set of the hub"
        raise ValueError(f"{expected}; got --dataset-name {printable_name(config.dataset_name)}; leave it out")


def _is_on_hub(name: str) -> bool:
    return name in ("wikitext", "c4") or (name != "builtin" and not Path(name).exists())


def _open(config: DataConfig, wanted: tuple[str, ...], tokenised: bool) -> _Origin:
    name = config.dataset_name
    _require_hub_for_configuration(config)
    if name == "builtin":
        texts = builtin_texts(cache_folder(config.cache_dir))
        return _Origin(name, name, platform.python_version(), texts)
    if not _is_on_hub(name):
        return _open_local(name, wanted, tokenised)
    if Path(name).exists():
        print(f"--dataset-name {name} is the data set of the hub; for what is called so here give ./{name}", file=sys.stderr)
    found = hub_set(name, config.dataset_config)
    revision, texts = hub_texts(found, wanted, offline=config.offline)
    return _Origin(name, f"{found.repository} ({found.config or 'default'})", revision, texts, streamed=not found.lines)


def _open_local(name: str, wanted: tuple[str, ...], tokenised: bool) -> _Origin:
    """A file or folder; of a split that is there as text and as tokens, GPT-2 takes the tokens."""
    path, source = Path(name), printable_name(name)
    if path.is_dir():
        text_files, token_files = local_files(path)
        token_files = token_files if tokenised else {}
        as_text = {split: file for split, file in text_files.items() if split in wanted and split not in token_files}
        texts = {split: file_text(file) for split, file in as_text.items()}
        return _Origin(printable_name(path.resolve().name), source, None, texts, token_files)
    return _Origin(printable_name(path.name), source, None, split_file(path))


def _split(origin: _Origin, name: str, tokenizer: Tokenizer, config: DataConfig, train_tokens: int | None) -> Split:
    if name in origin.token_files:
        ids = read_token_file(origin.token_files[name])
    elif name in origin.texts:
        more_than = (train_tokens if name == "train" else STREAMED_VALID_TOKENS) if origin.streamed else None
        ids = _tokenise(origin.texts[name], tokenizer, cache_folder(config.cache_dir), more_than)
    else:
        raise _no_split(origin.source, name, {*origin.texts, *origin.token_files}, config)
    if not any(np.any(ids[i : i + CHUNK] != tokenizer.end_of_text) for i in range(0, len(ids), CHUNK)):  # the first has text
        raise ValueError(f"the {name} split of {origin.source} must hold text; got none; choose another data set")
    if ids.max() >= tokenizer.vocab_size:  # which load_tokenizer keeps at most the model's
        raise ValueError(
            f"the {name} split of {origin.source} must have ids below {tokenizer.vocab_size}; got {ids.max()}; "
            f"tokenise it with {tokenizer.name}"
        )
    return Split(name, ids, ids_sha256(ids))


def _tokenise(text: Text, tokenizer: Tokenizer, cache_dir: Path, more_than: int | None) -> np.ndarray:
    key = {"text": text.key, "tokenizer": tokenizer.fingerprint, "more_than": more_than}
    return cached_ids(cache_dir, key, tokenizer.dtype, lambda: tokenizer.encode_documents(text.documents(), more_than))
