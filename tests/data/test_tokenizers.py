import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1.config import DataConfig
from phase1.data import tokenizer_files
from phase1.data.text import Text, count_words, pieces
from phase1.data.tokenizer_files import folder_tokenizer, gpt2_tokenizer, load_tokenizer, trained_tokenizer
from phase1.data.tokenizers import byte_alphabet, make_tokenizer

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


def test_merges_that_are_not_those_of_gpt2_are_refused(monkeypatch):
    read = type(Path()).read_text
    for change in (lambda text: text.replace("\n", "\nĠ ĠĠ\n", 1), lambda text: text.rpartition("\n")[0].rpartition("\n")[0]):
        monkeypatch.setattr(type(Path()), "read_text", lambda path, change=change, **options: change(read(path, **options)))
        with pytest.raises(ValueError, match=r"^[^\n]*must hold GPT-2's merges[^\n]*install phase1 again$"):
            gpt2_tokenizer()


def test_the_package_holds_the_licence_of_what_it_took_from_gpt2():
    assert "OpenAI" in (Path(tokenizer_files.__file__).parent / "gpt2" / "LICENSE").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalizer": {"type": "NFC"}}, "ByteLevel BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "ByteLevel BPE"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel BPE"),
        ({"model": {}}, "lacks 'type'"),
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
