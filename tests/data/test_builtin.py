import os
import subprocess
import sys

import pytest

from phase1.data import load_corpus
from phase1.data.builtin import MIN_BYTES, builtin_documents, builtin_texts, docstrings
from phase1.errors import Unavailable


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def whole(texts):
    return {name: ["".join(document) for document in text.documents()] for name, text in texts.items()}


def test_builtin_has_megabytes_in_three_splits_that_share_no_document(cache):
    splits = whole(builtin_texts(cache))
    assert sum(len(text.encode()) for texts in splits.values() for text in texts) >= MIN_BYTES
    every = [text for texts in splits.values() for text in texts]
    assert sorted(every) == sorted(builtin_documents(cache))
    for name in ("valid", "test"):
        assert 0.02 < sum(map(len, splits[name])) / sum(map(len, every)) < 0.10
    assert any("Assert statements are a convenient way" in text for text in every)


def test_builtin_is_the_same_in_another_process_and_from_the_cache(cache, tmp_path):
    code = (
        "import sys; from pathlib import Path; from phase1.data.builtin import builtin_texts;"
        "print(*(text.key for text in builtin_texts(Path(sys.argv[1])).values()))"
    )
    here = [text.key for text in builtin_texts(cache).values()]
    for folder, hash_seed in ((tmp_path, "7"), (cache, "8")):  # found anew; read back
        command = [sys.executable, "-c", code, str(folder)]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert run.stdout.split() == here


def test_docstrings_are_read_without_running_the_module():
    source = b'"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\n'
    assert docstrings(source) == "Module.\n\nClass.\n\nMethod.\n"
    assert docstrings(b"x = 1") == docstrings(b"print 'python 2'") == ""


def test_a_python_without_its_sources_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr("phase1.data.builtin.builtin_documents", lambda cache_dir: ("short",))
    with pytest.raises(Unavailable, match="^[^\n]*got 5; use a Python with its .py sources or --dataset-name PATH$"):
        builtin_texts(cache)


def test_builtin_corpus_has_a_tokenizer_of_its_own(cache, data_config):
    config = data_config("builtin")
    object.__setattr__(config, "cache_dir", str(cache))
    corpus = load_corpus(config, vocab_size=512, need=("valid", "test"))
    assert (corpus.name, corpus.source, corpus.tokenizer.vocab_size) == ("builtin", "builtin", 512)
    assert corpus.revision == ".".join(map(str, sys.version_info[:3]))
    valid = whole({"valid": builtin_texts(cache)["valid"]})["valid"]
    assert corpus.tokenizer.decode(corpus.splits["valid"].ids) == "".join(valid)
    assert (corpus.splits["valid"].ids == corpus.tokenizer.end_of_text).sum() == len(valid)
