import pytest

from phase1.data.tokenizers import byte_alphabet, make_tokenizer
from phase1.training.checkpoint import INDEX
from phase1.training.job import keep_tokenizer, tokenizer_beside

BYTES = make_tokenizer("bytes", {token: i for i, token in enumerate([*byte_alphabet(), "<|endoftext|>"])}, [])
OTHER = make_tokenizer("other", {token: i for i, token in enumerate(["<|endoftext|>", *byte_alphabet()])}, [])


def test_a_file_that_means_the_same_stays_as_it_is(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(BYTES.to_json() + "\n")
    keep_tokenizer(tmp_path, BYTES)
    assert path.read_text() == BYTES.to_json() + "\n"


@pytest.mark.parametrize("content", [OTHER.to_json(), "{"])
def test_a_foreign_file_is_not_replaced_and_a_damaged_one_of_a_checkpoint_is(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*which stays; remove it, or use another --out-dir$"):
        keep_tokenizer(tmp_path, BYTES)
    assert path.read_text() == content
    (tmp_path / INDEX).write_text("{}")
    keep_tokenizer(tmp_path, BYTES)
    assert path.read_text() == BYTES.to_json()


def test_what_ends_without_a_checkpoint_leaves_no_tokenizer_that_another_text_would_meet(tmp_path):
    with pytest.raises(ValueError, match="too short"), tokenizer_beside(tmp_path, OTHER):
        raise ValueError("too short")
    with tokenizer_beside(tmp_path, BYTES):
        assert (tmp_path / "tokenizer.json").read_text() == BYTES.to_json()
        (tmp_path / INDEX).write_text("{}")
    assert (tmp_path / "tokenizer.json").exists()


def test_a_file_that_was_there_stays(tmp_path):
    keep_tokenizer(tmp_path, BYTES)
    with pytest.raises(ValueError, match="too short"), tokenizer_beside(tmp_path, BYTES):
        raise ValueError("too short")
    assert (tmp_path / "tokenizer.json").exists()
