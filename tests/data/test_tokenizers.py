import json
import lzma
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from phase1.config import DataConfig
from phase1.data import tokenizer_files
from phase1.data.interruptible import interruptible
from phase1.data.text import Text, count_words, pieces
from phase1.data.tokenizer_files import (
    folder_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    short_runs,
    tokenizer_kind,
    trained_tokenizer,
)
from phase1.data.tokenizers import byte_alphabet, make_tokenizer
from tests.damage import damaged

AWKWARD = st.text(st.sampled_from("ab'sté1 \n\t\r\u00a0\u2003\x1c.,🙂東\u0301"), max_size=60)


def bytes_tokenizer():
    """The smallest vocabulary: end-of-text and the bytes."""
    return make_tokenizer("bytes", {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(byte_alphabet())}, [])


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


def test_gpt2_gives_the_published_ids(gpt2):
    assert gpt2.encode("Hello world, it's  GPT-2!\n") == [15496, 995, 11, 340, 338, 220, 402, 11571, 12, 17, 0, 198]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


@settings(max_examples=300, deadline=None)
@given(text=AWKWARD, size=st.integers(1, 8), parts=st.integers(1, 5))
def test_pieces_encode_as_the_whole_does(gpt2, text, size, parts):
    document = [text[i : i + parts] for i in range(0, len(text), parts)]
    cut = list(pieces(document, size))
    assert "".join(cut) == text
    whole = gpt2._backend.encode(text).ids  # the library's own encoding, in one go
    assert [i for piece in cut for i in gpt2._backend.encode(piece).ids] == whole


def test_long_text_is_cut_into_pieces_of_the_asked_size():
    cut = list(pieces(["word " * 1000, "more\n" * 1000], size=100))
    assert max(map(len, cut)) <= 200 and len(cut) > 50
    assert list(pieces(["x" * 1000, "y" * 1000], size=100)) == ["x" * 1000 + "y" * 1000]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=50))
def test_any_text_survives_encoding_and_its_bytes_add_up(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_gpt2_token_bytes_add_up_to_the_text(gpt2, english):
    ids = gpt2.encode_documents([[english * 50], [english, "end"]])
    assert gpt2.token_bytes()[ids].sum() == len((english * 51 + "end").encode())
    assert gpt2.token_bytes()[gpt2.end_of_text] == 0


def test_end_of_text_follows_every_document_and_nothing_else():
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode_documents([["a", "b"], [], ["c <|endoftext|>"]])
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)
    assert [tokenizer.decode(part) for part in parts] == ["ab", "", "c <|endoftext|>", ""]


def test_reading_stops_with_the_document_that_is_enough():
    read = []

    def documents():
        for i in range(1000):
            read.append(i)
            yield ["x" * 99]

    ids = bytes_tokenizer().encode_documents(documents(), more_than=250)
    assert len(ids) == 300
    assert len(read) < 50
    long = bytes_tokenizer().encode_documents([["long document " * 20_000], ["another"]], more_than=10)
    assert len(long) == 14 * 20_000 + 1  # whole documents only


def test_trained_tokenizer_is_the_same_in_another_process(tmp_path, english):
    code = (
        "import sys; from pathlib import Path; from phase1.data.text import Text;"
        "from phase1.data.tokenizer_files import trained_tokenizer;"
        "text = Text('k', lambda: iter([[sys.argv[2]] * 50]));"
        "print(trained_tokenizer(text, 400, Path(sys.argv[1])).fingerprint)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(i)), english], capture_output=True, text=True, check=True
        )
        for i in range(2)
    ]
    here = trained_tokenizer(Text("k", lambda: iter([[english] * 50])), 400, tmp_path)
    assert {run.stdout.strip() for run in runs} == {here.fingerprint}


def test_trained_tokenizer_is_cached_by_text_and_size(tmp_path, english):
    text = Text("one", lambda: iter([[english] * 20]))
    first = trained_tokenizer(text, 300, tmp_path)
    again = trained_tokenizer(Text("one", lambda: pytest.fail("read again")), 300, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert first.vocab_size == 300
    assert trained_tokenizer(text, 310, tmp_path).vocab_size == 310
    other = trained_tokenizer(Text("two", lambda: iter([["another text, another text"]])), 300, tmp_path)
    assert other.fingerprint != first.fingerprint
    assert other.vocab_size < 300  # no pair is left that occurs twice
    assert first.decode(first.encode(english)) == english


def test_a_saved_tokenizer_encodes_as_before(tmp_path, gpt2, english):
    (tmp_path / "tokenizer.json").write_text(gpt2._backend.to_str())
    loaded = load_tokenizer(DataConfig(tokenizer=str(tmp_path)), 50257, None)
    assert loaded.fingerprint == gpt2.fingerprint
    assert loaded.encode(english) == gpt2.encode(english)


def test_the_package_holds_the_licence_of_what_it_took_from_gpt2():
    assert "OpenAI" in (tokenizer_files.GPT2_MERGES.with_name("gpt2_merges.LICENSE")).read_text()


def test_gpt2_comes_with_the_package_and_a_damaged_file_is_refused(tmp_path, monkeypatch):
    whole = tokenizer_files.GPT2_MERGES.read_bytes()
    lines = lzma.decompress(whole).splitlines(keepends=True)
    for broken in (whole[:-20], b"", lzma.compress(b"".join(lines[:-1])), lzma.compress(b"".join(reversed(lines)))):
        (tmp_path / "merges").write_bytes(broken)
        monkeypatch.setattr(tokenizer_files, "GPT2_MERGES", tmp_path / "merges")
        with pytest.raises(ValueError, match=r"^[^\n]*install phase1 again$"):
            gpt2_tokenizer()
    monkeypatch.undo()
    assert gpt2_tokenizer().vocab_size == tokenizer_files.GPT2_SIZE


def test_auto_is_bpe_where_the_models_vocabulary_is_smaller_than_gpt2s(data_config):
    assert tokenizer_kind(data_config("wikitext"), 50257) == "gpt2"
    assert tokenizer_kind(data_config("wikitext"), 50256) == "bpe"
    assert tokenizer_kind(data_config("wikitext", tokenizer="gpt2"), 2) == "gpt2"
    assert tokenizer_kind(data_config("builtin"), 50257) == "bpe"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalizer": {"type": "NFC"}}, "ByteLevel BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "ByteLevel BPE"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel BPE"),
        ({"model": {}}, "model with type None"),
        ({"model": []}, "no model"),
        ({"model": None}, "no model"),
        ({"pre_tokenizer": None}, "no pre_tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "use_regex False"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "new": 1}}, "'new', which is not read"),
        ({"truncation": {"max_length": 8}}, "truncation"),
        ({"padding": {"strategy": "BatchLongest"}}, "padding"),
        ({"added_tokens": [{"id": 3, "content": "ab", "special": False}]}, "not special"),
        ({"added_tokens": [{"id": 3, "content": "a", "special": True}]}, "two ids for 'a'"),
        ({"added_tokens": [{"id": "3", "content": "a", "special": True}]}, "an added token"),
        ({"added_tokens": {}}, "no vocab, merges and added_tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "must hold <|endoftext|> and all 256 bytes"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path, change, message):
    content = json.loads(bytes_tokenizer()._backend.to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as caught:
        folder_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, vocab_size, message",
    [
        ({"tokenizer": "gpt3"}, 50257, "--tokenizer must be auto, gpt2, bpe or a folder"),
        ({"tokenizer": "gpt2"}, 50256, "--vocab-size must be at least 50257.*got 50256"),
        ({"tokenizer": "bpe"}, 256, "--vocab-size must be at least 257"),
    ],
)
def test_a_wrong_tokenizer_option_is_one_line(data_config, fields, vocab_size, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        load_tokenizer(data_config("wikitext", **fields), vocab_size, Text("k", lambda: iter([["text"]])))


def test_words_are_counted_as_wikitext_is_reported():
    assert count_words(" = Title = \n \n two words .\n") == 3 + 3 + 3


def learnt(**options):
    """A trained tokenizer.json, as an object, and text that it was trained on."""
    text = " ".join(f"some words {i} and others" for i in range(200))
    backend = Backend(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(byte_alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False, **options)
    backend.train_from_iterator([text], trainer)
    return json.loads(backend.to_str()), text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ignore_merges": True}, "model with ignore_merges True"), ({"dropout": 0.5}, "model with dropout 0.5"),
        ({"byte_fallback": True}, "byte_fallback True"), ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix '</w>'"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix '##'"), ({"a_new_option": 1}, "'a_new_option', which is not read"),
        ({"merges": [["zz", "qq"]]}, "'zz', which is not in vocab"), ({"merges": [["a", "b", "c"]]}, "no pair of tokens"),
        ({"merges": ["a"]}, "no pair of tokens"), ({"merges": ["a b c"]}, "no pair of tokens"), ({"merges": [1]}, "no pair of tokens"),
        ({"merges": [["a", None]]}, "no pair of tokens"), ({"merges": {}}, "no vocab, merges"), ({"vocab": []}, "no vocab, merges"),
        ({"vocab": {"a": "5"}}, "the id '5' of 'a'"), ({"vocab": {"a": 5.5}}, "the id 5.5 of 'a'"), ({"vocab": {"a": None}}, "the id None of 'a'"),
        ({"vocab": {"a": True}}, "the id True of 'a'"), ({"vocab": {"a": -1}}, "got gaps"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_options_that_are_not_read_and_damage_are_refused_by_name(tmp_path, change, message):
    content, text = learnt()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert folder_tokenizer(tmp_path).encode(text) == Backend.from_str(json.dumps(content)).encode(text).ids
    for key, value in change.items():
        content["model"][key] = content["model"]["vocab"] | value if key == "vocab" and value else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        folder_tokenizer(tmp_path)
    assert message in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("options", [{"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "##"}], ids=str)
def test_a_tokenizer_that_was_trained_with_such_an_option_is_refused(tmp_path, options):
    (tmp_path / "tokenizer.json").write_text(json.dumps(learnt(**options)[0]))
    with pytest.raises(ValueError, match=next(iter(options))):
        folder_tokenizer(tmp_path)


def test_a_tokenizer_file_damaged_in_any_way_gives_the_ids_of_its_library_or_is_refused_in_one_line(tmp_path):
    content, text = learnt()
    good, rng, refused = json.dumps(content).encode(), random.Random(7), 0
    for case in range(300):
        how, data, _ = damaged(rng, [("memory", good, content)])
        (tmp_path / "tokenizer.json").write_bytes(data)
        try:
            ids = folder_tokenizer(tmp_path).encode(text[:300])
        except ValueError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000, (case, how)
        else:
            try:
                library = Backend.from_str(data.decode())
            except Exception:  # of what Python reads and its own reader does not, such as half a pair of surrogates
                continue
            assert ids == library.encode(text[:300]).ids, (case, how)
    assert 100 < refused < 300


def test_a_damaged_tokenizer_in_the_cache_is_made_again(tmp_path):
    text = Text("k", lambda: iter([["some words and some other words"]]))
    first = trained_tokenizer(text, 280, tmp_path)
    (path,) = tmp_path.rglob("tokenizer.json")
    for damage in (b"", b"{}", path.read_bytes()[:-9]):
        path.write_bytes(damage)
        assert trained_tokenizer(text, 280, tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize("letters", ["ACGT", "朝市場魚", " \t"], ids=["letters", "japanese", "blanks"])
def test_text_without_spaces_takes_time_in_proportion_to_its_length(tmp_path, letters):
    """Training once took time with the square: 8 s for the longer one here."""

    def seconds(length):
        text = "".join(random.Random(5).choices(letters, k=length)) + "\n"
        began = time.process_time()
        tokenizer = trained_tokenizer(Text(f"{length}", lambda: iter([[text]])), 400, tmp_path)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return time.process_time() - began

    seconds(1000)
    assert seconds(120_000) < 4 * seconds(60_000) + 0.5


def test_long_runs_are_cut_and_nothing_else(english):
    texts = [english, "x" * 1000 + " " + "y" * 100, " " * 700 + "z", "ab " * 300, ""]
    for text in texts:
        assert "".join(short_runs(text)) == text
    assert [list(short_runs(text)) == [text] for text in texts] == [True, False, False, True, True]
    assert max(len(run) for part in short_runs("q" * 5000) for run in part.split()) == 256


def test_an_interrupt_ends_a_long_call_into_a_library(interrupts_arrive):
    began = time.monotonic()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: time.sleep(30))
    assert time.monotonic() - began < 5
    assert interruptible(lambda: 3) == 3
    with pytest.raises(LookupError, match="as raised"):
        interruptible(lambda: (_ for _ in ()).throw(LookupError("as raised")))
