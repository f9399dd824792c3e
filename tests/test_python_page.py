"""docs/python.md: its blocks run as written, one after the other, in a folder with a checkpoint and a report."""

import re
from pathlib import Path

import pytest

from phase1.records.schema import FILES, write_report
from tests.generation.test_decoder import checkpoint  # noqa: F401, a fixture
from tests.reports import all_reports

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("python.md", "ja/python.md")


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_both_pages_have_the_same_code():
    ours, theirs = ([re.sub(r"  # .*", "", block) for block in blocks(page)] for page in PAGES)
    assert ours == theirs and len(ours) == 7


def test_every_block_runs(checkpoint, tmp_path_factory, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("pandas")
    folder = tmp_path_factory.mktemp("python")
    monkeypatch.chdir(folder)
    (folder / "results/checkpoints").mkdir(parents=True)
    (folder / "results/checkpoints/train").symlink_to(checkpoint)
    write_report(all_reports()["throughput"], folder / "results/benchmarks" / FILES["throughput"])
    names = {}
    for block in blocks(PAGES[0]):
        exec(block, names)
    out = capsys.readouterr().out
    assert "nats per token" in out and "7.2 GB usable" in out and names["status"] == 0
    assert names["loss"].isfinite() and names["scaling"].verdict in out and "seq_length" in out
    assert len(out.splitlines()[0]) > len("The ")
