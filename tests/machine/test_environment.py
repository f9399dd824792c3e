import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phase1.machine import environment as module
from phase1.machine.cards import card_named
from phase1.machine.environment import current_command, environment, free_gpu_bytes, git_commit, machine, total_gpu_bytes
from phase1.measure.throughput.disturbances import GpuSample
from phase1.measure.throughput.monitor import Monitor
from phase1.text import without_home

ALLOWED = {
    "phase1", "git_commit", "python", "torch", "triton", "os", "cpu", "cpu_cores", "cpu_threads", "ram_bytes", "cuda", "device",
    "gpu", "gpu_count", "gpu_memory_bytes", "gpu_compute_capability", "cudnn", "driver", "world_size", "backend",
}  # fmt: skip


def test_the_environment_is_the_allow_list_as_plain_json():
    facts = environment()
    assert set(facts) == ALLOWED
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["ram_bytes"] > 2**30 and facts["cpu_cores"] >= 1


def test_the_environment_names_no_host_no_user_and_no_home():
    text = json.dumps(environment())
    for private in (socket.gethostname(), str(Path.home()), getpass.getuser()):
        assert len(private) < 4 or private not in text


@pytest.mark.parametrize(
    "argv, command",
    [
        (["/opt/venv/bin/phase1", "memory", "--batch-size", "4"], "phase1 memory --batch-size 4"),
        (["/x/site-packages/phase1/__main__.py", "doctor"], "phase1 doctor"),
        (["/x/scripts/validate_phase1_memory.py", "--no-baseline"], "python scripts/validate_phase1_memory.py --no-baseline"),
        (["/x/benchmarks/calibrate_memory.py"], "python benchmarks/calibrate_memory.py"),
        (["/home/ann/own.py"], "python own.py"),
        (["phase1", "memory", "--out-dir", "/home/ann/my results"], "phase1 memory --out-dir '~/my results'"),
    ],
)
def test_the_command_can_be_typed_again_and_holds_no_home(monkeypatch, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    assert current_command() == command


@pytest.mark.parametrize("path", ["/home/ann/x", "/Users/ann/x", r"C:\Users\ann\x", str(Path.home() / "x")])
def test_homes_are_replaced(path):
    assert "ann" not in without_home(f"open {path!s}: missing") and "~" in without_home(path)


def test_the_commit_is_that_of_this_package_with_a_mark_when_it_differs(tmp_path, monkeypatch):
    package = tmp_path / "src" / "phase1"
    package.mkdir(parents=True)
    source = package / "__init__.py"
    source.write_text("")
    monkeypatch.setattr(module.phase1, "__file__", str(source))
    assert git_commit() is None

    def git(*args):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "README").write_text("a project that has the package installed inside its folder")
    git("add", "README")
    git("commit", "-m", "first")
    assert git_commit() is None, "a checkout that does not hold the package is not its commit"
    git("add", ".")
    git("commit", "-m", "second")
    (tmp_path / "results.json").write_text("{}")
    assert git_commit() == git("rev-parse", "HEAD")
    source.write_text("changed = True")
    assert git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert git_commit() is None


def test_without_a_driver_free_gpu_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(module, "nvml", lambda question: None)
    assert free_gpu_bytes() is None


NVIDIA, AMD = "NVIDIA GeForce RTX 4090", "AMD Instinct MI300X"
GIB = 2**30


@pytest.fixture
def nvidia(monkeypatch):
    """The driver's library of NVIDIA, with a card of 24 GiB."""
    answers = {
        "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetHandleByIndex": "handle", "nvmlDeviceGetName": NVIDIA,
        "nvmlSystemGetDriverVersion": "580.1", "nvmlDeviceGetMemoryInfo": SimpleNamespace(free=20 * GIB, total=24 * GIB),
    }  # fmt: skip
    functions = {name: lambda *_, answer=answer: answer for name, answer in answers.items()}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=type("NVMLError", (Exception,), {}), **functions))


def rocm(monkeypatch, used):
    """PyTorch as it is made for ROCm, with a card of 192 GiB; `used` answers for amdsmi."""
    card = SimpleNamespace(name=AMD, total_memory=192 * GIB, major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device_memory_used", used, raising=False)


def no_amdsmi(device):
    raise ModuleNotFoundError("amdsmi does not seem to be installed or it can't be imported.")


def test_a_card_of_nvidia_is_asked_by_its_driver(nvidia):
    assert (free_gpu_bytes(), total_gpu_bytes()) == (20 * GIB, 24 * GIB)
    assert (machine()["gpu"], machine()["driver"]) == (NVIDIA, "580.1")


@pytest.mark.parametrize("used, free", [(lambda device: 2 * GIB, 190 * GIB), (no_amdsmi, None)])
def test_a_card_of_amd_gets_no_number_of_the_card_of_nvidia_beside_it(nvidia, monkeypatch, used, free):
    rocm(monkeypatch, used)
    assert (free_gpu_bytes(), total_gpu_bytes()) == (free, 192 * GIB)
    assert (machine()["gpu"], machine()["driver"]) == (AMD, None)
    facts = environment()
    assert (facts["gpu"], facts["gpu_memory_bytes"], facts["driver"], facts["cuda"]) == (AMD, 192 * GIB, None, None)
    assert facts["gpu_compute_capability"] == "gfx942:sramecc+:xnack-"
    monitor = Monitor("cuda")
    monitor.sample()
    assert monitor.samples == [GpuSample()]  # neither a clock nor a reason
    assert card_named(AMD, 192 * GIB) is None  # no rate of products, so no utilization


def test_without_a_library_of_a_driver_nothing_is_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (free_gpu_bytes(), total_gpu_bytes(), machine()["gpu"], machine()["driver"]) == (None,) * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_facts_of_the_machine_are_asked_without_a_cuda_context():
    code = "import torch; from phase1.machine.environment import machine; print(machine()['gpu']); print(torch.cuda.is_initialized())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[0] not in ("", "None") and out[1] == "False"


def test_the_facts_of_the_machine_are_plain_and_the_same_every_time():
    facts = machine()
    assert facts == machine() == json.loads(json.dumps(facts)) and facts["torch"] == torch.__version__
