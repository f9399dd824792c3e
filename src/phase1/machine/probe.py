"""Check that this machine's CUDA and Triton work, for `phase1 doctor`."""

import importlib
from typing import Any

from phase1.machine.environment import package_version
from phase1.machine.isolate import run_isolated

SECONDS = 120.0  # to load libraries, make a context and compile one kernel: a driver that takes longer hangs


def cuda_status() -> str:
    """Compute a small product on the GPU and check it; the answer is "works" or why not."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "no: this PyTorch is built without CUDA and ROCm"
    if not torch.cuda.is_available():
        return "no: PyTorch sees no GPU (no driver, too old a driver, or CUDA_VISIBLE_DEVICES hides it)"
    outcome = run_isolated(_multiply, timeout_s=SECONDS)
    return "works" if outcome.value else f"no: {outcome.message or 'wrong result of a matrix product'}"


def triton_status() -> str:
    """Compile and run a small kernel on the GPU and check its result; the answer is "works" or why not."""
    import torch

    if package_version("triton") is None:
        return "no: not installed"
    if not torch.cuda.is_available():
        return "not tried: needs a GPU"
    outcome = run_isolated(_run_kernel, timeout_s=SECONDS)
    return "works" if outcome.value else f"no: {outcome.message or 'wrong result of a kernel'}"


def _multiply() -> bool:
    import torch

    a = torch.arange(64.0, device="cuda").reshape(8, 8)
    return bool(torch.equal((a @ a).cpu(), a.cpu() @ a.cpu()))


def _run_kernel() -> bool:
    kernel: Any = importlib.import_module("phase1.machine.probe_kernel")
    return bool(kernel.doubles())


def rocm_version() -> str | None:
    """The version of ROCm that PyTorch was made for, None where it was made for CUDA or the CPU."""
    import torch

    return torch.version.hip
