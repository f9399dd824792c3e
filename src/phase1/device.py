"""Where models run: decided here, for every command."""

import torch


def device_type() -> str:
    """cuda if PyTorch has a GPU (of NVIDIA; with ROCm of AMD), else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def unused_accelerator() -> str | None:
    """The accelerator that is there and not used, if there is one: an Intel GPU (xpu) or an Apple GPU (mps)."""
    if torch.cuda.is_available():
        return None
    there = {"xpu": hasattr(torch, "xpu") and torch.xpu.is_available(), "mps": torch.backends.mps.is_available()}
    return next((name for name, found in there.items() if found), None)
