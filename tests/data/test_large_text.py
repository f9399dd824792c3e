"""A training on a long text begins at once, and holds none of it."""

import hashlib
import time
import tracemalloc

import pytest

from phase1.data import Windows, load_corpus
from phase1.vocabulary.statistics import token_counts

V = 50_257


@pytest.fixture
def begin(tmp_path, data_config):
    """Makes a text of so many tokens, a file of zeros that takes no place on the disk; gives what begins a training on it."""

    def text_of(tokens):
        with (tmp_path / "train.gpt2.bin").open("w+b") as file:
            file.truncate(2 * tokens)
            while file.read(1 << 24):  # what a disk takes is not measured
                pass

        def first_batch_and_counts():
            corpus = load_corpus(data_config(tmp_path), vocab_size=V, need=("train",), train_tokens=tokens)
            windows = Windows(corpus.splits["train"].ids, 512, seed=0)
            assert windows.batch(0, 8)[0].shape == (8, 512)
            assert token_counts(windows.seen(len(windows)), V)[0] == tokens

        return first_batch_and_counts

    return text_of


def seconds_of(function):
    """Of this process: other tests may run beside it."""
    began = time.process_time()
    function()
    return time.process_time() - began


def test_a_billion_tokens_begin_in_ten_seconds(begin):
    """Where a gigabyte is hashed in 0.6 seconds; a slower core has as many times more."""
    gigabyte = seconds_of(lambda: [digest.update(bytes(1 << 24)) for digest in [hashlib.sha256()] for _ in range(60)])
    assert seconds_of(begin(1_000_000_000)) < 10 * max(1, gigabyte / 0.6)


def test_memory_does_not_grow_with_the_text(begin):
    first_batch_and_counts = begin(100_000_000)
    tracemalloc.start()
    first_batch_and_counts()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # less than a byte a token; most of it is the tokenizer
