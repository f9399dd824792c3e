"""The hub without a network: a false `datasets`, and a real one on a cache that `hf download` could have left."""

import gzip
import json
import logging
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from phase1.data import load_corpus
from phase1.data.hub import quiet
from phase1.errors import Unavailable

pytestmark = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is missing")
V = 50257
COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
WIKITEXT = ["", " = Title = \n", "", " Some text , with words . \n", " More @-@ text . \n"]  # rows as the hub has them


@pytest.fixture
def online(monkeypatch):
    """A hub that answers; returns the calls of load_dataset and the rows that were read."""
    log = SimpleNamespace(calls=[], rows=0, error=None)

    def rows(texts):
        for text in texts:
            log.rows += 1
            yield text if isinstance(text, dict) else {"text": text, "url": "x"}

    class Rows:
        def __init__(self, texts):
            self.texts = texts

        def __iter__(self):
            return rows(self.texts)

    def load_dataset(place, config, **options):
        log.calls.append((place, config, options))
        if log.error is not None:
            raise log.error
        if place == "Salesforce/wikitext":
            return {split: Rows(WIKITEXT) for split in ("train", "validation", "test")}
        if place == "owner/images":
            return {"train": Rows([{"image": 1}]), "validation": Rows([{"image": 1}])}
        if place == "owner/one-split":
            return {"train": Rows(WIKITEXT)}
        documents = [f"document {i} " + "word " * 500 for i in range(100_000)]
        return {"train": Rows(documents), "validation": Rows([text.upper() for text in documents])}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    return log


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and empty caches of the hub's libraries; returns the folder for downloaded repositories."""

    def fail(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "hub"


def test_wikitext_is_todays_repository_with_its_original_text(online, data_config):
    corpus = load_corpus(data_config("wikitext"), vocab_size=V, need=("train", "valid", "test"))
    assert online.calls == [("Salesforce/wikitext", "wikitext-103-raw-v1", {"streaming": False, "revision": COMMIT})]
    assert (corpus.name, corpus.revision) == ("wikitext", COMMIT)
    assert corpus.source == "Salesforce/wikitext (wikitext-103-raw-v1)"
    ids = corpus.splits["valid"].ids
    original = " \n = Title = \n \n Some text , with words . \n More @-@ text . \n"
    assert corpus.tokenizer.decode(ids) == original
    assert list(ids) == corpus.tokenizer.encode(original) + [corpus.tokenizer.end_of_text]


def test_c4_is_read_no_further_than_the_tokens_that_are_needed(online, data_config):
    corpus = load_corpus(data_config("c4", dataset_config="en"), vocab_size=V, need=("train",), train_tokens=20_000)
    assert online.calls == [("allenai/c4", "en", {"streaming": True, "revision": COMMIT})]
    ids = corpus.splits["train"].ids
    assert 20_000 < len(ids) < 21_000
    assert online.rows < 200
    ends = ids == corpus.tokenizer.end_of_text
    assert ends[-1] and ends.sum() == len(ids) // 504 + (len(ids) % 504 > 0)
    assert corpus.tokenizer.decode(ids[:504]).startswith("document 0 word word")
    corpus = load_corpus(data_config("c4", dataset_config="en"), vocab_size=V, need=("train",), train_tokens=30_000)
    assert len(corpus.splits["train"].ids) > 30_000


def test_validation_of_a_streamed_set_is_bounded(online, data_config, monkeypatch):
    monkeypatch.setattr("phase1.data.corpora.STREAMED_VALID_TOKENS", 3000)
    corpus = load_corpus(data_config("c4", dataset_config="en"), vocab_size=V, need=("valid",))
    assert 3000 < len(corpus.splits["valid"].ids) < 6000
    with pytest.raises(ValueError, match="allenai/c4 .* is streamed: train_tokens must say"):
        load_corpus(data_config("c4", dataset_config="en"), vocab_size=V)


def test_tokens_of_a_commit_are_read_from_the_hub_once(online, data_config):
    for _ in range(2):
        load_corpus(data_config("wikitext"), vocab_size=V, need=("valid",))
    assert online.rows == len(WIKITEXT)


def test_another_repository_is_used_under_its_own_name(online, data_config):
    corpus = load_corpus(data_config("owner/name", dataset_config="default"), vocab_size=V, need=("valid",), train_tokens=10)
    assert corpus.source == "owner/name (default)"
    with pytest.raises(ValueError, match=r"^owner/images must have a column named text; got image; [^\n]*$"):
        load_corpus(data_config("owner/images", dataset_config="default"), vocab_size=V, need=("valid",))


def test_a_split_that_the_set_lacks_is_an_error_and_no_other_split(online, data_config):
    with pytest.raises(ValueError, match=r"must have a test split; got only train, validation; [^\n]*$"):
        load_corpus(data_config("c4", dataset_config="en"), vocab_size=V, need=("test",))
    with pytest.raises(ValueError, match=r"must have a valid split; got only train; [^\n]*$"):
        load_corpus(data_config("owner/one-split"), vocab_size=V, need=("valid",))


def test_a_wrong_configuration_is_the_users_mistake(online, data_config):
    online.error = ValueError("BuilderConfig 'fr' not found.\nAvailable: ['en', 'realnewslike']")
    with pytest.raises(ValueError, match=r"--dataset-config fr: [^\n]*Available: \['en', 'realnewslike'\]$"):
        load_corpus(data_config("c4", dataset_config="fr"), vocab_size=V, need=("valid",))


def test_a_connection_that_breaks_later_is_unavailable(online, data_config):
    online.error = ConnectionError("lost")
    with pytest.raises(Unavailable, match=r"^data set allenai/c4 \(en\) cannot be reached: ConnectionError: lost; [^\n]*$"):
        load_corpus(data_config("c4", dataset_config="en"), vocab_size=V, need=("valid",))


def test_an_unreachable_hub_names_the_cause_and_both_ways_out(offline, data_config):
    with pytest.raises(Unavailable) as caught:
        load_corpus(data_config("wikitext"), vocab_size=V)
    assert str(caught.value) == (
        "data set Salesforce/wikitext (wikitext-103-raw-v1) cannot be reached: OSError: Name or service not known; download it "
        "first where there is a network (`hf download --repo-type dataset Salesforce/wikitext`) or use --dataset-name builtin"
    )
    assert not (offline.parent / "cache").exists()


def test_without_a_network_a_real_program_ends_at_once_with_nothing_else_printed(tmp_path):
    code = (
        "import sys\nfrom phase1.config import DataConfig\nfrom phase1.data import load_corpus\n"
        "from phase1.errors import Unavailable\n"
        "try:\n    load_corpus(DataConfig(dataset_name='c4', dataset_config='en', cache_dir=sys.argv[1]), vocab_size=50257)\n"
        "except Unavailable as error:\n    print(error)"
    )
    # a port where nobody listens: refused at once, whatever network the machine has
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert run.stderr == ""
    assert run.stdout.count("\n") == 1 and "Connection refused" in run.stdout
    assert "hf download --repo-type dataset allenai/c4 README.md en/c4-train.00000-of-01024.json.gz" in run.stdout


def downloaded(folder, repository, card, files):
    """What `hf download` leaves: blobs, and a snapshot of links to them."""
    root = folder / f"datasets--{repository.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for i, (name, data) in enumerate({"README.md": f"---\n{card}---\n".encode(), **files}.items()):
        (root / "blobs" / str(i)).write_bytes(data)
        link = root / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(root / "blobs" / str(i))


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


CARD = """\
configs:
- config_name: {config}
  data_files:
  - split: train
    path: {config}/train*
  - split: validation
    path: {config}/validation*
dataset_info:
- config_name: {config}
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 0
    num_examples: {train}
  - name: validation
    num_bytes: 0
    num_examples: 5
"""


@pytest.mark.parametrize("repository", ["Salesforce/wikitext", "wikitext"], ids=["today", "former name"])
def test_a_downloaded_wikitext_needs_no_network(offline, data_config, repository):
    config = "wikitext-2-raw-v1"
    rows = {f"{config}/{name}.jsonl": json_lines(WIKITEXT) for name in ("train", "validation")}
    downloaded(offline, repository, CARD.format(config=config, train=5), rows)
    corpus = load_corpus(data_config("wikitext", dataset_config=config), vocab_size=V)
    assert corpus.revision == COMMIT
    assert corpus.tokenizer.decode(corpus.splits["train"].ids).startswith(" \n = Title = \n \n Some text")


def test_what_load_dataset_has_prepared_under_its_former_name_is_found(offline, data_config, tmp_path, monkeypatch):
    """`load_dataset("wikitext", ...)`, as the first guide has it."""
    import datasets

    config, features = "wikitext-2-raw-v1", datasets.Features({"text": datasets.Value("string")})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "prepared")
    folder = tmp_path / "prepared" / "wikitext" / config / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name="wikitext")
    for name in ("train", "validation"):
        writer = datasets.arrow_writer.ArrowWriter(path=str(folder / f"wikitext-{name}.arrow"), features=features)
        for text in WIKITEXT:
            writer.write({"text": text})
        examples, size = writer.finalize()
        splits[name] = datasets.SplitInfo(name=name, num_bytes=size, num_examples=examples, dataset_name="wikitext")
    info = {"builder_name": "parquet", "dataset_name": "wikitext", "config_name": config, "version": "0.0.0"}
    datasets.DatasetInfo(features=features, splits=splits, **info).write_to_directory(str(folder))
    corpus = load_corpus(data_config("wikitext", dataset_config=config), vocab_size=V)
    assert corpus.revision == COMMIT
    assert corpus.tokenizer.decode(corpus.splits["train"].ids).startswith(" \n = Title = \n \n Some text")


def test_half_a_download_is_not_taken_for_the_whole(offline, data_config):
    config = "wikitext-2-raw-v1"
    rows = {f"{config}/{name}.jsonl": json_lines(WIKITEXT) for name in ("train", "validation")}
    downloaded(offline, "Salesforce/wikitext", CARD.format(config=config, train=10), rows)
    with pytest.raises(Unavailable, match=r"^data set Salesforce/wikitext .* NonMatchingSplitsSizesError[^\n]*$"):
        load_corpus(data_config("wikitext", dataset_config=config), vocab_size=V)


def test_a_downloaded_part_of_c4_needs_no_network(offline, data_config):
    documents = {f"en/{name}.json.gz": gzip.compress(json_lines(["One .", "Two ."])) for name in ("train", "validation")}
    downloaded(offline, "allenai/c4", CARD.format(config="en", train=2).split("dataset_info")[0], documents)
    corpus = load_corpus(data_config("c4", dataset_config="en"), vocab_size=V, train_tokens=3)
    assert corpus.tokenizer.decode(corpus.splits["train"].ids) == "One .Two ."
    assert len(corpus.splits["train"].ids) == 6
    with pytest.raises(ValueError, match="--dataset-config fr: .*en"):
        load_corpus(data_config("c4", dataset_config="fr"), vocab_size=V, train_tokens=3)


def test_a_card_without_data_is_not_a_copy(offline, data_config):
    downloaded(offline, "allenai/c4", CARD.format(config="en", train=2).split("dataset_info")[0], {})
    with pytest.raises(Unavailable, match=r"^data set allenai/c4 \(en\) cannot be reached: [^\n]*$"):
        load_corpus(data_config("c4", dataset_config="en"), vocab_size=V, train_tokens=3)


def test_quiet_silences_for_a_while_and_leaves_everything_as_it_was(monkeypatch, capsys):
    import datasets

    monkeypatch.setattr("logging.root.manager.disable", logging.NOTSET)
    names = [name for name in vars(datasets.config) if name.startswith("STREAMING") and "RETR" in name]
    for name in names:
        monkeypatch.setattr(datasets.config, name, 20)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    datasets.enable_progress_bars()
    filters = list(warnings.filters)
    with pytest.raises(KeyError), quiet():
        assert not logging.getLogger("datasets").isEnabledFor(logging.CRITICAL)
        warnings.warn("noise", stacklevel=1)
        assert datasets.are_progress_bars_disabled()
        for action in ("OPEN", "READ"):
            seconds = getattr(datasets.config, f"STREAMING_{action}_MAX_RETRIES")
            seconds *= getattr(datasets.config, f"STREAMING_{action}_RETRY_INTERVAL")
            assert seconds <= 5
        raise KeyError
    assert capsys.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET
    assert not datasets.are_progress_bars_disabled()
    assert warnings.filters == filters
    assert {getattr(datasets.config, name) for name in names} == {20}
