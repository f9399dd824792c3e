"""A byte-level BPE of GPT-2's kind: vocabulary and merges in, token ids out."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from phase1.data.interruptible import interruptible
from phase1.data.text import Document, pieces
from phase1.progress import progress
from phase1.text import one_line

END_OF_TEXT = "<|endoftext|>"
BATCH_CHARS = 1 << 22  # text that is encoded at once, so that memory does not grow with the corpus


@dataclass(frozen=True)
class Tokenizer:
    """Encodes any text without loss; made by `make_tokenizer`.

    Text that spells `<|endoftext|>` is encoded as ordinary characters: only the end of a document is end-of-text.
    """

    name: str
    vocab_size: int
    end_of_text: int
    fingerprint: str
    """SHA-256 of vocabulary and merges: equal fingerprints mean equal tokens for every text."""
    _backend: Any = field(repr=False, compare=False)
    _bytes: tuple[bytes, ...] = field(repr=False, compare=False)

    @property
    def dtype(self) -> np.dtype:
        """Smallest type that holds every id: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without end-of-text."""
        return [i for ids in self._encode_pieces([(piece, False) for piece in pieces([text])]) for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end-of-text is empty, half a character at an edge is U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def bytes_of(self, id: int) -> bytes:
        """UTF-8 of one id, which may be part of a character; end-of-text is empty."""
        return self._bytes[id]

    def to_json(self) -> str:
        """What `tokenizer.json` holds: a file of the package tokenizers, from which `folder_tokenizer` makes this again."""
        return str(self._backend.to_str())

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes that each id stands for; their sum over a text's ids is the text's size."""
        return np.array([len(value) for value in self._bytes], dtype=np.int64)

    def encode_documents(self, documents: Iterable[Document], more_than: int | None = None) -> np.ndarray:
        """Ids of all documents, of type `dtype`, end-of-text after each.

        Ends with the first document that brings the count above `more_than`, and reads at most a batch beyond it.
        """
        parts: list[np.ndarray] = []
        count = 0
        marked = _mark_ends(documents)
        with progress(desc="tokenise", unit="char", unit_scale=True, leave=False) as bar:
            while batch := _take(marked, BATCH_CHARS if more_than is None else min(BATCH_CHARS, 8 * more_than + 1)):
                for (piece, ends), ids in zip(batch, self._encode_pieces(batch), strict=True):
                    parts.append(np.array(ids, dtype=self.dtype))
                    count += len(ids)
                    bar.update(len(piece))
                    if ends and more_than is not None and count > more_than:
                        return np.concatenate(parts)
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def _encode_pieces(self, batch: list[tuple[str, bool]]) -> Iterator[list[int]]:
        encodings = interruptible(lambda: self._backend.encode_batch_fast([piece for piece, _ in batch]))
        for (_, ends), encoding in zip(batch, encodings, strict=True):
            yield encoding.ids + [self.end_of_text] if ends else encoding.ids


def make_tokenizer(name: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer of a byte-level vocabulary, written in GPT-2's byte alphabet.

    Raises ValueError where ids have gaps, end-of-text or a single byte is missing, or a token is not made of bytes.
    """
    import tokenizers

    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"tokenizer {name}: ids must be 0 to {len(tokens) - 1}, each once; got gaps; use another")
    alphabet = byte_alphabet()
    missing = [token for token in (END_OF_TEXT, *alphabet) if token not in vocab]
    if missing:
        raise ValueError(
            f"tokenizer {name}: the vocabulary must hold {END_OF_TEXT} and all 256 bytes; got none for {missing[0]!r}; "
            "use a byte-level BPE such as gpt2"
        )
    values = []
    for token in tokens:
        if token != END_OF_TEXT and not alphabet.keys() >= set(token):
            raise ValueError(f"tokenizer {name}: tokens must be in GPT-2's byte alphabet; got {token!r}; use gpt2")
        values.append(b"" if token == END_OF_TEXT else bytes(alphabet[char] for char in token))
    try:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"tokenizer {name}: merges must be of its tokens; got {one_line(error)}; use another") from error
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()  # for other programs that read `to_json`
    content = json.dumps([tokens, [list(pair) for pair in merges]], separators=(",", ":"))
    return Tokenizer(
        name=name,
        vocab_size=len(tokens),
        end_of_text=vocab[END_OF_TEXT],
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        _backend=backend,
        _bytes=tuple(values),
    )


def byte_alphabet() -> dict[str, int]:
    """Byte of each of the 256 characters in which GPT-2 writes its vocabulary: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _mark_ends(documents: Iterable[Document]) -> Iterator[tuple[str, bool]]:
    """(piece, whether a document ends with it) of all documents in order; an empty document has one empty piece."""
    for document in documents:
        held = None
        for piece in pieces(document):
            if held is not None:
                yield held, False
            held = piece
        yield held or "", True


def _take(marked: Iterator[tuple[str, bool]], chars: int) -> list[tuple[str, bool]]:
    """The next pieces of at least `chars` characters together, fewer at the end."""
    batch, length = [], 0
    for item in islice(marked, 1 << 15):  # many empty documents must not make one endless batch
        batch.append(item)
        length += len(item[0])
        if length >= chars:
            break
    return batch
