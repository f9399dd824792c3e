"""The examples of docs/hugging_face.md run as they are written."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
from phase1.cli import main
from tests.generation.test_decoder import checkpoint  # noqa: F401, a fixture

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["hugging_face.md", "ja/hugging_face.md"])
def test_every_example_runs(page, checkpoint, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("peft")
    assert main(["export", "--checkpoint", str(checkpoint), "--out-dir", str(tmp_path / "export")]) == 0
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("results/export", str(tmp_path / "export")), names)
    assert "The" in capsys.readouterr().out
    ids = torch.tensor([[1, 2, 3]])
    assert names["lora"].train()(input_ids=ids, labels=ids).loss.requires_grad
