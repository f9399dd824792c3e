"""The continuation of a text, token by token, and its characters as soon as they are whole."""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from phase1.data.tokenizers import Tokenizer
from phase1.generation.decoder import Decoder, States
from phase1.generation.sampling import Sampling


def continuation(
    decoder: Decoder, log_p: Tensor, state: States, sampling: Sampling, *, max_tokens: int, seed: int, sample: int = 0
) -> Iterator[int]:
    """At most `max_tokens` ids after the text that gave `log_p` and `state`; ends before end-of-text.

    Sample number `sample` of a seed is the same text whatever other samples are drawn.
    """
    chances = np.random.Generator(np.random.PCG64([seed, sample]))
    tokenizer = decoder.tokenizer
    for count in range(1, max_tokens + 1):
        id = sampling.next_id(log_p[: tokenizer.vocab_size], chances.random())  # a table may have rows for no token
        if id == tokenizer.end_of_text:
            return
        yield id
        if count < max_tokens:
            log_p, state = decoder.step(id, state)


def text_of(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of `ids` piece by piece: a character is held back until all its bytes are there, half a one is U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id in ids:
        yield decoder.decode(tokenizer.bytes_of(id))
    yield decoder.decode(b"", final=True)
