"""Where a tokenizer's vocabulary comes from: GPT-2's merges in this package, a folder, or training on the corpus."""

import contextlib
import json
import lzma
import re
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from phase1.config import DataConfig
from phase1.data.cache import cache_folder, store
from phase1.data.interruptible import interruptible
from phase1.data.text import Text
from phase1.data.tokenizers import END_OF_TEXT, Tokenizer, byte_alphabet, make_tokenizer
from phase1.files import read_json
from phase1.text import one_line

GPT2_FINGERPRINT = "2a84aa51ea049287ee4c5e438e96023cd6c3bc5250a519851ff57885941f125c"
GPT2_SIZE = 50257
TOKENIZER = "tokenizer.json"
GPT2_MERGES = Path(__file__).with_name("gpt2_merges.txt.xz")
BPE_TRAINING_CHARS = 64_000_000  # more text changes a BPE little and takes minutes
BPE_MIN_FREQUENCY = 2
LONGEST_RUN = 256  # characters of one word in the training of a BPE
MAX_FILE_BYTES = 64 * 2**20  # a tokenizer.json of 250,000 entries has 20 MB
PLAIN: dict[tuple[str, str], tuple[Any, ...]] = {
    ("model", "type"): ("BPE",),
    ("model", "dropout"): (None, 0),
    ("model", "continuing_subword_prefix"): (None, ""),
    ("model", "end_of_word_suffix"): (None, ""),
    ("model", "byte_fallback"): (None, False),
    ("model", "ignore_merges"): (None, False),
    ("pre_tokenizer", "type"): ("ByteLevel",),
    ("pre_tokenizer", "add_prefix_space"): (False,),
    ("pre_tokenizer", "use_regex"): (None, True),
    ("file", "normalizer"): (None,),
    ("file", "truncation"): (None,),
    ("file", "padding"): (None,),
}
"""Options of a tokenizer.json, and the values (None: missing) with which it encodes as `make_tokenizer` does."""
HARMLESS = {"model": {"vocab", "merges", "unk_token", "fuse_unk"}, "pre_tokenizer": {"trim_offsets"}}
"""Further options that change no id: every byte has a token, so that nothing is unknown."""


def tokenizer_kind(config: DataConfig, vocab_size: int) -> str:
    """`config.tokenizer` with auto resolved: bpe for builtin and where GPT-2's has too many entries, gpt2 otherwise."""
    if config.tokenizer != "auto":
        return config.tokenizer
    return "bpe" if config.dataset_name == "builtin" or vocab_size < GPT2_SIZE else "gpt2"


def load_tokenizer(config: DataConfig, vocab_size: int, training_text: Text | None) -> Tokenizer:
    """The tokenizer of `config`; `training_text` is what a `bpe` is trained on (None: there is only tokenised data).

    Raises ValueError where it has more than `vocab_size` entries or cannot be read. Uses no network.
    """
    kind = tokenizer_kind(config, vocab_size)
    if kind == "bpe":
        tokenizer = trained_tokenizer(training_text, vocab_size, cache_folder(config.cache_dir))
    else:
        tokenizer = ready_tokenizer(kind)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"--vocab-size must be at least {tokenizer.vocab_size}, the entries of tokenizer {tokenizer.name}; "
            f"got {vocab_size}; raise it or use --tokenizer bpe"
        )
    return tokenizer


def ready_tokenizer(kind: str) -> Tokenizer:
    """GPT-2's tokenizer, or that of a folder; ValueError where `kind` is neither."""
    if kind == "gpt2":
        return gpt2_tokenizer()
    if Path(kind).is_dir():
        return folder_tokenizer(Path(kind))
    raise ValueError(f"--tokenizer must be auto, gpt2, bpe or a folder with tokenizer.json; got {kind}; use one")


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's BPE, from the merges in this package: the ids of its vocabulary are the bytes, then the merges in order.

    Source: vocab.bpe of OpenAI's GPT-2, github.com/openai/gpt-2, MIT license. Raises ValueError where the file is damaged.
    """
    try:
        lines = lzma.decompress(GPT2_MERGES.read_bytes()).decode().splitlines()
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{GPT2_MERGES} must hold GPT-2's merges; got {error}; install phase1 again") from error
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    tokens = [*byte_alphabet(), *(left + right for left, right in merges), END_OF_TEXT]
    tokenizer = make_tokenizer("gpt2", {token: i for i, token in enumerate(tokens)}, merges)
    if tokenizer.fingerprint != GPT2_FINGERPRINT:
        raise ValueError(
            f"{GPT2_MERGES} must hold GPT-2's merges, fingerprint {GPT2_FINGERPRINT[:12]}; got "
            f"{tokenizer.fingerprint[:12]}; install phase1 again"
        )
    return tokenizer


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level BPE of `folder`/tokenizer.json; ValueError, one line, for a damaged file or options that are not read."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"--tokenizer {folder}: a folder must hold tokenizer.json; got none; save the tokenizer there")
    return make_tokenizer(folder.name, *_read_tokenizer_json(path))


def trained_tokenizer(text: Text | None, vocab_size: int, cache_dir: Path) -> Tokenizer:
    """A BPE trained on (at most the first 64 million characters of) `text`, kept under `cache_dir` for the next run.

    Has `vocab_size` entries, or fewer where no pair of tokens is left that occurs twice.
    """
    if text is None:
        remedy = "add train.txt, or give gpt2 or the folder of a checkpoint"
        raise ValueError(f"--tokenizer bpe must have a training text; got none; {remedy}")
    smallest = 1 + len(byte_alphabet())
    if vocab_size < smallest:
        raise ValueError(
            f"--vocab-size must be at least {smallest} for bpe (256 bytes, end-of-text); got {vocab_size}; raise it"
        )
    key = json.dumps(["bpe 2", text.key, vocab_size, BPE_MIN_FREQUENCY, BPE_TRAINING_CHARS])
    path = cache_dir / "tokenizers" / sha256(key.encode()).hexdigest()[:32] / TOKENIZER
    name = f"bpe-{vocab_size}"
    if path.is_file():
        with contextlib.suppress(ValueError):  # damaged, and so made again
            return make_tokenizer(name, *_read_tokenizer_json(path))
    store(path, _train(text, vocab_size).encode())
    return make_tokenizer(name, *_read_tokenizer_json(path))


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
    parts = (part for text_part in _first_chars(text, BPE_TRAINING_CHARS) for part in short_runs(text_part))
    interruptible(lambda: backend.train_from_iterator(parts, trainer))
    return backend.to_str()


_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}(?=\S)|\s{{{LONGEST_RUN}}}(?=\s)")


def short_runs(text: str) -> Iterator[str]:
    """`text` cut where a run with or without white space gets too long, since training takes time with its square."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


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
        _require_plain(content)
        return _vocabulary(content)
    except ValueError as error:
        raise ValueError(f"{path} must be a ByteLevel BPE as of GPT-2; got {one_line(error)}; use such a file") from error


def _require_plain(content: Any) -> None:
    """Raise ValueError, naming the option, where a file asks for an encoding that is not that of `make_tokenizer`."""
    sections = {"file": content} | {name: content.get(name) if isinstance(content, dict) else None for name in HARMLESS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{'no JSON object' if name == 'file' else f'no {name}'}")
    for (name, option), plain in PLAIN.items():
        value = sections[name].get(option)
        if not any(value == wanted and isinstance(value, bool) <= isinstance(wanted, bool) for wanted in plain):
            raise ValueError(f"{name} with {option} {value!r:.60}")
    for name, harmless in HARMLESS.items():
        known = harmless | {option for where, option in PLAIN if where == name}
        if unknown := sections[name].keys() - known:
            raise ValueError(f"{name} with {min(unknown)!r:.60}, which is not read")


def _vocabulary(content: dict[str, Any]) -> Vocabulary:
    """Check the file part by part, because the library `tokenizers` ends the process or raises an error without a name."""
    vocab, merges, added = content["model"].get("vocab"), content["model"].get("merges"), content.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError("no vocab, merges and added_tokens")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise ValueError(f"an added token {token!r:.60}")
        if token.get("special") is not True:
            raise ValueError(
                f"the added token {token['content']!r:.60}, which is not special: it would be found inside of texts"
            )
        if vocab.get(token["content"], token["id"]) != token["id"]:
            raise ValueError(f"two ids for {token['content']!r:.60}")
        vocab = vocab | {token["content"]: token["id"]} if token["content"] not in vocab else vocab
    for token, number in vocab.items():
        if type(number) is not int:
            raise ValueError(f"the id {number!r:.60} of {token!r:.60}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"a merge {pair!r:.60} that is no pair of tokens")
        if missing := [part for part in (*pair, "".join(pair)) if part not in vocab]:
            raise ValueError(f"a merge {' '.join(pair)!r:.60} of or to {missing[0]!r:.60}, which is not in vocab")
    return vocab, [(left, right) for left, right in pairs]


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} must be a readable JSON file; got {error}; download or save it again") from error
