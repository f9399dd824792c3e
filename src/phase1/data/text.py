"""Text as documents, cut into pieces that a GPT-2-style tokenizer encodes one by one as it would the whole."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

Document = Iterable[str]
"""The text of one document, in parts of any size; nothing is put between the parts."""

PIECE_CHARS = 1 << 16
_SAFE_CUT = re.compile(r"(?<=\S)[ \n]")


@dataclass(frozen=True)
class Text:
    """The text of one split."""

    key: str
    """What identifies the content: equal keys mean equal documents."""
    documents: Callable[[], Iterator[Document]]
    """Read the documents from the start; end-of-text follows each of them in the tokens."""


def pieces(document: Document, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a document into pieces of about `size` characters; joined they are the document.

    A cut is only made where white space begins: before a space or newline that follows another character. No match of
    GPT-2's pattern `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+` crosses such a
    place and none looks behind it, so the tokens of the pieces are the tokens of the whole. (A cut after a newline
    is not safe: the white space around it may be one match.) Text without such a place stays in one piece.
    """
    held: list[str] = []
    length, enough = 0, 2 * size
    for part in document:
        held.append(part)
        length += len(part)
        if length < enough:
            continue
        text = "".join(held)
        start = 0
        while (cut := _SAFE_CUT.search(text, start + size)) is not None:
            yield text[start : cut.start()]
            start = cut.start()
        held = [text[start:]]
        length = len(held[0])
        enough = 2 * max(size, length)  # doubled, so that text without a place to cut is not searched over and over
    if rest := "".join(held):
        yield rest


def count_words(text: str) -> int:
    """Words between white space plus one per newline, the count that WikiText perplexities per word use."""
    return len(text.split()) + text.count("\n")
