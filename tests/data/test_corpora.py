import hashlib
import io
import json
import lzma
import sys
import tracemalloc

import numpy as np
import pytest

from phase1.cli import main
from phase1.data import load_corpus
from phase1.data.local import read_token_file
from tests.reports import assert_one_line

V = 50257


def write_tokens(path, ids):
    data = np.array(ids, dtype="<u2").tobytes()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)


def lines_of(count):
    return [f"line {i} .\n" for i in range(count)]


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.txt.xz"])
def test_of_a_text_file_the_last_twentieth_of_lines_is_valid(tmp_path, data_config, name):
    lines = lines_of(100)
    data = "".join(lines).encode()
    (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    corpus = load_corpus(data_config(tmp_path / name), vocab_size=V)
    train, valid = (corpus.splits[split].ids for split in ("train", "valid"))
    assert corpus.tokenizer.decode(train) == "".join(lines[:95])
    assert corpus.tokenizer.decode(valid) == "".join(lines[95:])
    assert train[-1] == valid[-1] == corpus.tokenizer.end_of_text
    assert (corpus.name, corpus.source, corpus.revision) == (name, str(tmp_path / name), None)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.xz"])
def test_every_line_of_json_is_a_document(tmp_path, data_config, name):
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(["one\nand", "two", "", "half \ud83d"])]
    data = "\n\n".join(lines).encode()
    (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    (tmp_path / "val.md").write_text("# valid")
    corpus = load_corpus(data_config(tmp_path), vocab_size=V)
    end = corpus.tokenizer.end_of_text
    texts = ["".join(corpus.tokenizer.decode(part)) for part in np.split(corpus.splits["train"].ids, np.flatnonzero(corpus.splits["train"].ids == end))]
    assert [text.removeprefix("<|endoftext|>") for text in texts] == ["one\nand", "two", "", "half ?", ""]
    assert corpus.tokenizer.decode(corpus.splits["valid"].ids).startswith("# valid")


def test_of_a_file_of_json_the_last_twentieth_of_lines_is_valid(tmp_path, data_config):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(40)))
    corpus = load_corpus(data_config(path), vocab_size=V)
    ids = {name: split.ids for name, split in corpus.splits.items()}
    assert [int((part == corpus.tokenizer.end_of_text).sum()) for part in ids.values()] == [38, 2]
    assert corpus.tokenizer.decode(ids["valid"][:-1]).replace("<|endoftext|>", "|").replace("||", "|") in ("line 38|line 39", "line 38line 39")


def test_the_hub_without_its_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["perplexity", "--dataset-name", "wikitext", "--cache-dir", str(tmp_path), "--out-dir", str(tmp_path)]) == 3
    err = capsys.readouterr().err
    assert_one_line(err)
    assert "`pip install 'datasets>=3.0'`" in err and "Salesforce/wikitext" in err


@pytest.mark.parametrize("count, held_out", [(2, 1), (39, 1), (40, 2), (300, 15)])
def test_at_least_one_line_is_held_out(tmp_path, data_config, count, held_out):
    (tmp_path / "corpus.txt").write_text("".join(lines_of(count)))
    corpus = load_corpus(data_config(tmp_path / "corpus.txt"), vocab_size=V, need=("valid",))
    assert corpus.tokenizer.decode(corpus.splits["valid"].ids) == "".join(lines_of(count)[-held_out:])


def test_blank_lines_of_json_and_at_the_end_of_a_text_are_none_of_the_held_out_lines(tmp_path, data_config):
    lines = lines_of(40)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line.strip()}) + "\n\n" for line in lines) + " \n" * 60)
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n" * 60)
    for name in ("a.jsonl", "a.txt"):
        corpus = load_corpus(data_config(tmp_path / name), vocab_size=V)
        train, valid = (corpus.tokenizer.decode(corpus.splits[split].ids) for split in ("train", "valid"))
        assert valid.count("line") == 2 and "line 39" in valid and "line 38" in valid
        assert "line 37" in train and "line 38" not in train
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n\n')
    with pytest.raises(ValueError, match="at least 2 lines that are not blank to be split into train and valid; got 1;"):
        load_corpus(data_config(tmp_path / "b.jsonl"), vocab_size=V)


def test_text_is_kept_byte_for_byte(tmp_path, data_config, english):
    (tmp_path / "train.txt").write_bytes((english * 100).encode())
    corpus = load_corpus(data_config(tmp_path), vocab_size=V, need=("train",))
    assert corpus.tokenizer.decode(corpus.splits["train"].ids) == english * 100


def test_a_folder_gives_each_split_from_its_own_file(tmp_path, data_config):
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "validation.txt.xz").write_bytes(lzma.compress(b"valid"))
    write_tokens(tmp_path / "test.gpt2.bin.xz", [9288, 50256])
    (tmp_path / "train-sample.txt").write_text("another file")
    corpus = load_corpus(data_config(tmp_path), vocab_size=V, need=("test", "valid", "train"))
    texts = {name: corpus.tokenizer.decode(split.ids) for name, split in corpus.splits.items()}
    assert texts == {"train": "train", "valid": "valid", "test": "test"}
    assert corpus.name == tmp_path.name


def test_token_files_are_mapped_and_stay_as_they_are(tmp_path):
    ids = np.arange(1_000_000, dtype=np.uint32) % 50_000
    path = tmp_path / "train.gpt2.bin"
    write_tokens(path, ids)
    tracemalloc.start()
    found = read_token_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, ids) and found.dtype == np.uint16
    assert peak < found.nbytes / 8
    found[0] = 7
    assert np.array_equal(read_token_file(path), ids)


def test_gpt2_prefers_tokens_and_another_tokenizer_the_text(tmp_path, data_config):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("from text, from text")
        write_tokens(tmp_path / f"{split}.gpt2.bin", [9288, 9288, 50256])
    corpus = load_corpus(data_config(tmp_path), vocab_size=V)
    assert list(corpus.splits["valid"].ids) == [9288, 9288, 50256]
    corpus = load_corpus(data_config(tmp_path, tokenizer="bpe"), vocab_size=300)
    assert corpus.tokenizer.decode(corpus.splits["valid"].ids) == "from text, from text"
    other = load_corpus(data_config(tmp_path, tokenizer="bpe"), vocab_size=258)  # not the cached tokens of the first
    assert other.tokenizer.decode(other.splits["valid"].ids) == "from text, from text"


def test_equal_tokens_have_one_hash_from_text_and_from_a_token_file(tmp_path, data_config, english):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "valid.txt").write_text(english, newline="")
    by_text = load_corpus(data_config(tmp_path / "text"), vocab_size=V, need=("valid",)).splits["valid"]
    write_tokens(tmp_path / "valid.gpt2.bin", by_text.ids)
    by_tokens = load_corpus(data_config(tmp_path), vocab_size=V, need=("valid",)).splits["valid"]
    assert by_text.sha256 == by_tokens.sha256 == hashlib.sha256(by_text.ids.astype("<u4").tobytes()).hexdigest()
    write_tokens(tmp_path / "valid.gpt2.bin", by_text.ids[::-1])
    assert load_corpus(data_config(tmp_path), vocab_size=V, need=("valid",)).splits["valid"].sha256 != by_text.sha256


def test_tokens_are_cached_by_content_and_a_damaged_cache_is_made_again(tmp_path, data_config, monkeypatch):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(lines_of(40)))
    first = load_corpus(data_config(path), vocab_size=V)
    cached = sorted((tmp_path / "cache" / "tokens").iterdir())
    assert len(cached) == 2
    with monkeypatch.context() as patch:
        patch.setattr("phase1.data.tokenizers.Tokenizer.encode_documents", lambda *_: pytest.fail("tokenised again"))
        again = load_corpus(data_config(path), vocab_size=V)
    assert all(np.array_equal(again.splits[name].ids, split.ids) for name, split in first.splits.items())
    for file in cached:
        file.write_bytes(file.read_bytes()[:-2])
    repaired = load_corpus(data_config(path), vocab_size=V)
    assert repaired.splits["train"].sha256 == first.splits["train"].sha256
    path.write_text("".join(lines_of(41)))
    assert load_corpus(data_config(path), vocab_size=V).splits["train"].sha256 != first.splits["train"].sha256


def test_ids_are_arrays_that_can_be_written_to(tmp_path, data_config):
    write_tokens(tmp_path / "train.gpt2.bin", [1, 2, 3])
    (tmp_path / "valid.txt").write_text("text")
    for _ in range(2):  # tokenised, then from the cache
        for split in load_corpus(data_config(tmp_path), vocab_size=V).splits.values():
            assert split.ids.dtype == np.uint16 and split.ids.flags.writeable


def npy(ids):
    file = io.BytesIO()
    np.save(file, np.array(ids, np.uint16))
    return file.getvalue()


def folder(**files):
    def make(path):
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content)
        return path

    return make


def file(name, content):
    def make(path):
        path.mkdir()
        (path / name).write_bytes(content)
        return path / name

    return make


@pytest.mark.parametrize(
    "make, fields, message",
    [
        (folder(train_txt=b"text"), {}, "must have a valid split .* got train; add valid.txt"),
        (folder(readme_md=b"text"), {}, "must hold train, valid or test as .* got none"),
        (folder(train_txt=b"a", valid_txt=b"b", validation_txt=b"c"), {}, "one text file of valid; got .*; remove all but one"),
        (folder(train_txt=b"a", val_md=b"b", valid_txt=b"c"), {}, "one text file of valid; got valid.txt and val.md; remove"),
        (folder(train_jsonl=b'{"text": "a"}\n{"txt": "b"}\n', valid_txt=b"a"), {}, 'line 2 of .*train.jsonl must be a JSON object with a string "text"; got txt; rename'),
        (folder(train_jsonl=b'{"text": 3}\n', valid_txt=b"a"), {}, 'a string "text"; got a number; remove the line or give a string'),
        (folder(train_jsonl=b'{"text": null}\n', valid_txt=b"a"), {}, 'a string "text"; got null; remove the line or give a string'),
        (folder(train_jsonl=b'{"text": {}}\n', valid_txt=b"a"), {}, "got an object; remove the line or give a string"),
        (folder(train_jsonl=b'["a"]\n', valid_txt=b"a"), {}, 'must be a JSON object .*; got a list; write it as {"text": ...}, or remove the line'),
        (folder(train_jsonl=b'{"text": "a"}\n5.5\n', valid_txt=b"a"), {}, "line 2 of .*; got a number; write it as"),
        (folder(train_jsonl=b'"a"\n', valid_txt=b"a"), {}, "got a string; write it as"),
        (folder(train_jsonl=b"true\n", valid_txt=b"a"), {}, "got true; write it as"),
        (folder(train_jsonl=b'{"text": "a"\n', valid_txt=b"a"), {}, "line 1 .*; got Expecting ',' delimiter"),
        (folder(train_jsonl=b"[" * 100_000, valid_txt=b"a"), {}, "line 1 .*; got .*recursion"),
        (folder(train_txt=b"text", valid_txt=b""), {}, "valid split of .* must hold text; got none"),
        (folder(train_txt=b"text", valid_gpt2_bin=b""), {}, "valid split of .* must hold text; got none"),
        (folder(train_txt=b"text", valid_gpt2_bin=b"abc"), {}, "two bytes per token; got 3 bytes, an odd number"),
        (folder(train_txt=b"text", valid_gpt2_bin=b"\x51\xc4"), {}, "ids below 50257; got 50257; tokenise it with gpt2"),
        (folder(train_txt=b"text", valid_gpt2_bin=npy([1, 2, 3])), {}, r"little-endian uint16, .*; got a .npy file; write ids.astype\('<u2'\).tofile\('valid.gpt2.bin'\)"),
        (folder(train_txt=b"text", valid_gpt2_bin=np.arange(9999, dtype="<u4").tobytes()), {}, r"uint16, .*; got uint32, .*; write ids"),
        (folder(train_txt=b"text", valid_gpt2_bin_xz=lzma.compress(np.array([5, 6], "<u4").tobytes())), {}, r"got uint32, .*; write ids"),
        (folder(train_txt=b"text", valid_gpt2_bin_xz=b"no xz"), {}, "must be xz data, as its name says; got something else; rename it"),
        (folder(train_txt_xz=b"plain text", valid_txt=b"a"), {}, "train.txt.xz must be xz data, as its name says; got something else; rename it"),
        (folder(train_txt_xz=lzma.compress(b"text" * 99)[:-9], valid_txt=b"a"), {}, "must be a readable file"),
        (folder(train_txt=b"text", valid_txt=b"\xff"), {}, "must be UTF-8 text; got invalid start byte in line 1, byte 0 of the text; remove it, or convert"),
        (folder(train_txt="é\n".encode() * 2 + b"ab\xc3", valid_txt=b"a"), {}, "train.txt must be UTF-8 text; got unexpected end of data in line 3, byte 8 "),
        (folder(train_txt_xz=lzma.compress(b"ab\n\xe9\n"), valid_txt=b"a"), {}, "got invalid continuation byte in line 2, byte 3 "),
        (folder(train_jsonl=b'{"text": "a"}\n{"text": "\xe9"}\n', valid_txt=b"a"), {}, "in line 2, byte 24 "),
        (folder(train_txt="text\n".encode("utf-16"), valid_txt=b"a"), {}, "got UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        (folder(train_txt=lzma.compress(b"text"), valid_txt=b"a"), {}, "got xz data; let its name end in .xz"),
        (file("corpus.txt", b"a\nb\n\xff\n"), {}, "corpus.txt must be UTF-8 text; got invalid start byte in line 3, byte 4 "),
        (file("corpus.txt", b"a\rb\rc\r"), {}, r"at least 2 lines .* got 1; break it into lines that end in .n, or put train.txt and valid.txt"),
        (folder(train_gpt2_bin=b"ab", valid_gpt2_bin=b"ab"), {"tokenizer": "bpe"}, "--tokenizer bpe must have a training text"),
        (file("corpus.txt", b"one line\n"), {}, "at least 2 lines .* got 1"),
        (file("corpus.txt", b""), {}, "at least 2 lines .* got 0"),
        (file("corpus.parquet", b"a\nb\n"), {}, "must be a text file .* got another ending; .* into lines of a .jsonl file"),
        (lambda path: path / "missing.txt", {}, "existing path or a hub repository owner/name; got .*missing.txt"),
        (lambda path: "wikitext103", {}, "must be wikitext, c4, builtin, .* got wikitext103"),
        (lambda path: "c4", {"dataset_config": "wikitext-103-raw-v1"}, "--dataset-config of c4 .* got wikitext-103-raw-v1; try --dataset-config en"),
        (lambda path: "builtin", {"dataset_config": "en"}, "--dataset-config needs a data set of the hub; got --dataset-name builtin; leave it out"),
        (lambda path: "wikitext", {"dataset_config": "en"}, "must be one of wikitext-103-raw-v1, .* got en"),
    ],
)
def test_unusable_data_is_named_in_one_line(tmp_path, data_config, make, fields, message):
    config = data_config(make(tmp_path / "data"), **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(config, vocab_size=V)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train.txt.xz", "train.jsonl.xz"])
def test_a_file_that_is_not_what_its_name_says_is_refused_also_where_its_bytes_are_known(tmp_path, data_config, name):
    content = b'{"text": "the cat sees the dog"}\n' * 9
    (tmp_path / "valid.txt").write_text("text")
    plain = tmp_path / name.removesuffix(".xz")
    plain.write_bytes(content)
    load_corpus(data_config(tmp_path), vocab_size=V)
    plain.rename(tmp_path / name)
    with pytest.raises(ValueError, match="must be xz data, as its name says; got something else; rename it"):
        load_corpus(data_config(tmp_path), vocab_size=V)


def test_only_the_needed_splits_must_be_there(tmp_path, data_config):
    (tmp_path / "valid.txt").write_text("text")
    assert list(load_corpus(data_config(tmp_path), vocab_size=V, need=("valid",)).splits) == ["valid"]
    with pytest.raises(ValueError, match="must have a train split"):
        load_corpus(data_config(tmp_path), vocab_size=V)
    with pytest.raises(ValueError, match="a split must be train, valid or test; got dev"):
        load_corpus(data_config(tmp_path), vocab_size=V, need=("dev",))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, data_config):
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "corpus.txt").write_text("".join(lines_of(40)))
    with pytest.raises(ValueError, match="^--cache-dir must be a folder with free space; got [^\n]*cache[^\n]*$"):
        load_corpus(data_config(tmp_path / "corpus.txt"), vocab_size=V)
