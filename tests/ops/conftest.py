from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def named_card(monkeypatch):
    """A card whose name no cache knows; on a machine with a GPU Triton compiles for what `major` and `minor` say."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 6)
    card = SimpleNamespace(name="a card", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
