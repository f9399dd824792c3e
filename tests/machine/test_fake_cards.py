"""One machine that is not there for each test: what it decides of precision, kernels and messages, all at once."""

from types import SimpleNamespace

import pytest
import torch

from phase1.commands import doctor
from phase1.device import device_type, steadier, unused_accelerator
from phase1.ops import card, self_check
from phase1.runs import DoctorRun
from phase1.training.step import compute_dtype, precision

PLAIN, WITH_BF16 = "lower --learning-rate", "lower --learning-rate or use --precision bf16"
NOT_USED = "an accelerator is there and is not used ({})"
MACHINES = {  # its accelerator, then: device, type, why, kernels, advice, and a text of doctor
    "turing": ({"name": "Tesla T4", "capability": (7, 5)}, "cuda", torch.float16, "fp16 on the GPU (sm_75 has no bf16)", False, PLAIN, "Tesla T4"),
    "ampere": ({"name": "NVIDIA A10", "capability": (8, 6)}, "cuda", torch.float16, "fp16 on the GPU", True, WITH_BF16, "NVIDIA A10"),
    "rocm": ({"name": "AMD Instinct MI300X", "capability": (9, 4), "hip": "6.4.1"}, "cuda", torch.float16, "fp16 on the GPU", True, WITH_BF16, "6.4.1"),
    "mps": ({"other": torch.backends.mps}, "cpu", torch.float32, "fp32 on the CPU", False, PLAIN, NOT_USED.format("mps")),
    "xpu": ({"other": torch.xpu}, "cpu", torch.float32, "fp32 on the CPU", False, PLAIN, NOT_USED.format("xpu")),
    "none": ({}, "cpu", torch.float32, "fp32 on the CPU", False, PLAIN, "no: PyTorch sees no GPU"),
}  # fmt: skip


def put(monkeypatch, name=None, capability=(0, 0), hip=None, other=None):
    """This accelerator into PyTorch, in place of what is there."""
    there, (major, minor) = name is not None, capability
    properties = SimpleNamespace(name=name, major=major, minor=minor, total_memory=16 * 2**30, multi_processor_count=40, gcnArchName="gfx942")
    answers = {
        "is_available": there, "device_count": int(there), "current_device": 0, "get_device_properties": properties,
        "get_device_capability": capability, "is_current_stream_capturing": False, "device_memory_used": 2**30,
    }  # fmt: skip
    for function, answer in answers.items():
        monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer, raising=False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    for module in (torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda module=module: module is other)
    monkeypatch.setattr(self_check, "proven", lambda device, dtype: True)
    monkeypatch.setattr(card, "HAS_TRITON", True)
    monkeypatch.setattr("phase1.machine.probe.run_isolated", lambda *_, **__: SimpleNamespace(value=True))


@pytest.mark.parametrize("machine", MACHINES)
def test_one_machine_decides_precision_kernels_and_messages(monkeypatch, capsys, machine):
    accelerator, device, dtype, why, kernels, advice, says = MACHINES[machine]
    put(monkeypatch, **accelerator)
    assert device_type() == device and compute_dtype("auto", device) == dtype and precision("auto", device) == why
    tensor = SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device), dtype=dtype)
    assert card.runs_kernels(tensor) is kernels
    assert steadier(torch.device(device)) == advice
    assert unused_accelerator() == (machine if machine in ("mps", "xpu") else None)
    assert doctor.main(DoctorRun()) == 0
    out = capsys.readouterr().out
    assert says in out and why in out and ("is not used" in out) == (machine in ("mps", "xpu"))
    assert dict(line.split(maxsplit=1) for line in out.splitlines() if line)["cuda_works"].startswith("works" if device == "cuda" else "no: ")
