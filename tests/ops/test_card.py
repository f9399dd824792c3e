"""Which cards run the Triton kernels, with cards that are not there."""

from types import SimpleNamespace

import pytest
import torch

from phase1.ops import card, self_check


@pytest.mark.parametrize(
    "major, on_gpu, triton, runs",
    [(7, True, True, False), (8, True, True, True), (12, True, True, True), (9, True, False, False), (9, False, True, False)],
)
def test_kernels_run_on_ampere_or_newer_where_triton_is(monkeypatch, major, on_gpu, triton, runs):
    monkeypatch.setattr(card, "HAS_TRITON", triton)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_check, "proven", lambda device, dtype: True)
    tensor = SimpleNamespace(is_cuda=on_gpu, device="cuda:0", dtype=torch.float16)
    assert card.runs_kernels(tensor) is card.is_recent(tensor) is runs
