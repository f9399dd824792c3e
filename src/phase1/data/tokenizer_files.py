"""Where a tokenizer's vocabulary comes from: GPT-2's merges in this package, a folder, or training on the corpus."""

import json
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from phase1.config import DataConfig
from phase1.data.cache import store
from phase1.data.text import Text
from phase1.data.tokenizers import END_OF_TEXT, Tokenizer, byte_alphabet, make_tokenizer

GPT2_FINGERPRINT = "2a84aa51ea049287ee4c5e438e96023cd6c3bc5250a519851ff57885941f125c"
TOKENIZER = "tokenizer.json"
BPE_TRAINING_CHARS = 64_000_000  # more text changes a BPE little and takes minutes
BPE_MIN_FREQUENCY = 2


def tokenizer_kind(config: DataConfig) -> str:
    """`config.tokenizer` with auto resolved: bpe for builtin, gpt2 otherwise."""
    if config.tokenizer != "auto":
        return config.tokenizer
    return "bpe" if config.dataset_name == "builtin" else "gpt2"


def load_tokenizer(config: DataConfig, vocab_size: int, training_text: Text | None) -> Tokenizer:
    """The tokenizer of `config`; `training_text` is what a `bpe` is trained on (None: there is only tokenised data).

    Raises ValueError where it has more than `vocab_size` entries or cannot be read. Uses no network.
    """
    kind = tokenizer_kind(config)
    if kind == "bpe":
        tokenizer = trained_tokenizer(training_text, vocab_size, Path(config.cache_dir).expanduser())
    elif kind == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif Path(kind).expanduser().is_dir():
        tokenizer = folder_tokenizer(Path(kind).expanduser())
    else:
        raise ValueError(f"--tokenizer must be auto, gpt2, bpe or a folder with tokenizer.json; got {kind}; use one")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"--vocab-size must be at least {tokenizer.vocab_size}, the entries of tokenizer {tokenizer.name}; "
            f"got {vocab_size}; raise it or use --tokenizer bpe"
        )
    return tokenizer


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's BPE, from the list of its merges that comes with this package.

    Ids are in the order of the 256 bytes, the merges, end-of-text. ValueError where the file is not GPT-2's.
    """
    path = Path(__file__).parent / "gpt2" / "vocab.bpe"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[1:]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must hold GPT-2's merges; got {error}; install phase1 again") from error
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]
    tokens = [*byte_alphabet(), *(left + right for left, right in merges), END_OF_TEXT]
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) == len(tokens) and vocab.keys() >= {part for pair in merges for part in pair}:
        tokenizer = make_tokenizer("gpt2", vocab, merges)
        if tokenizer.fingerprint == GPT2_FINGERPRINT:
            return tokenizer
    raise ValueError(f"{path} must hold GPT-2's merges; got {len(merges):,} others; install phase1 again")


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level BPE of `folder`/tokenizer.json."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"--tokenizer {folder}: a folder must hold tokenizer.json; got none; save the tokenizer there")
    return make_tokenizer(folder.name, *_read_tokenizer_json(path))


def trained_tokenizer(text: Text | None, vocab_size: int, cache_dir: Path) -> Tokenizer:
    """A BPE trained on (at most the first 64 million characters of) `text`, kept under `cache_dir` for the next run.

    Has `vocab_size` entries, or fewer where no pair of tokens is left that occurs twice.
    """
    if text is None:
        raise ValueError("--tokenizer bpe must have a training text; got none; add train.txt or use gpt2")
    smallest = 1 + len(byte_alphabet())
    if vocab_size < smallest:
        raise ValueError(
            f"--vocab-size must be at least {smallest} for bpe (256 bytes, end-of-text); got {vocab_size}; raise it"
        )
    key = json.dumps(["bpe 1", text.key, vocab_size, BPE_MIN_FREQUENCY, BPE_TRAINING_CHARS])
    path = cache_dir / "tokenizers" / sha256(key.encode()).hexdigest()[:32] / TOKENIZER
    if not path.is_file():
        store(path, _train(text, vocab_size).encode())
    return make_tokenizer(f"bpe-{vocab_size}", *_read_tokenizer_json(path))


def _train(text: Text, vocab_size: int) -> str:
    import sys

    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=BPE_MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(_first_chars(text, BPE_TRAINING_CHARS), trainer)
    return backend.to_str()


def _first_chars(text: Text, count: int) -> Iterator[str]:
    for part in chain.from_iterable(text.documents()):
        yield part[:count]
        count -= len(part)
        if count <= 0:
            return


Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


def _read_tokenizer_json(path: Path) -> Vocabulary:
    """Vocabulary and merges of a `tokenizers` file that encodes as `make_tokenizer` does."""
    content = _read_json(path)
    try:
        model, before = content["model"], content["pre_tokenizer"]
        got = f"{model['type']} with {(before or {}).get('type')} and normalizer {content.get('normalizer')}"
        plain = model["type"] == "BPE" and before["type"] == "ByteLevel" and content.get("normalizer") is None
        if not plain or before["add_prefix_space"] or not before.get("use_regex", True):
            raise ValueError(f"{path} must be a ByteLevel BPE as of GPT-2; got {got}; use such a file")
        vocab = model["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a file of the package tokenizers; it lacks {error}; save it again") from error
    return vocab, merges


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a readable JSON file; got {error}; download or save it again") from error
