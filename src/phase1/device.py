"""Where models run: decided here, for every command."""

import torch


def device_type() -> str:
    """cuda if PyTorch has a GPU (of NVIDIA; with ROCm of AMD), else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(name: str) -> None:
    """Raise ValueError for a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"the device must be one of PyTorch's, cpu or cuda; got {name!r:.80}; correct it") from error
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"the device must be there; got {name}, and PyTorch sees {torch.cuda.device_count()} GPUs; try cpu")


def steadier(device: torch.device) -> str:
    """What helps against numbers that are not finite: another type too, where the card has it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "lower --learning-rate" + " or use --precision bf16" * has_bf16


def unused_accelerator() -> str | None:
    """The accelerator that is there and not used, if there is one: an Intel GPU (xpu) or an Apple GPU (mps)."""
    if torch.cuda.is_available():
        return None
    there = {"xpu": hasattr(torch, "xpu") and torch.xpu.is_available(), "mps": torch.backends.mps.is_available()}
    return next((name for name, found in there.items() if found), None)
