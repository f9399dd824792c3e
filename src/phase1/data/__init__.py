"""Text in, token ids out: corpora, tokenizers, token statistics and the order of training windows."""

from phase1.data.corpora import Corpus, NoSplit, Split, check_names, load_corpus
from phase1.data.text import count_words
from phase1.data.tokenizers import Tokenizer
from phase1.data.windows import Windows

__all__ = [
    "Corpus",
    "NoSplit",
    "Split",
    "Tokenizer",
    "Windows",
    "check_names",
    "count_words",
    "load_corpus",
]
