"""Facts of the hardware and software behind a number: an allow-list, without names of hosts, users or folders."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import phase1
from phase1 import world
from phase1.config import Config
from phase1.text import without_private

Fact = str | int | float | bool | None


def environment() -> dict[str, Fact]:
    """Facts of hardware and software that a result depends on; None if this machine does not tell."""
    import torch

    facts: dict[str, Fact] = {
        "phase1": phase1.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "world_size": world.size(),
        "backend": None if world.size() == 1 else "nccl" if torch.cuda.is_available() else "gloo",
        "ram_bytes": ram_bytes(),
        "cuda": torch.version.cuda,
        "device": "cpu",
        "gpu": None,
        "gpu_count": 0,
        "gpu_memory_bytes": None,
        "gpu_compute_capability": None,
        "cudnn": None,
        "driver": None,
    }
    return facts | (_gpu_facts() if torch.cuda.is_available() else {})


def machine() -> dict[str, Fact]:
    """Facts that must be equal for numbers to share one report. Makes no CUDA context, which a measurement would count."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cpu": cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "world_size": world.size(),
        "gpu": amd.name if (amd := amd_gpu()) else nvml(lambda library, handle: library.nvmlDeviceGetName(handle)),
        "driver": nvml(lambda library, _: library.nvmlSystemGetDriverVersion()),
    }


def _gpu_facts() -> dict[str, Fact]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "gpu": properties.name,
        "gpu_count": torch.cuda.device_count(),
        "gpu_memory_bytes": properties.total_memory,
        "gpu_compute_capability": properties.gcnArchName if amd_gpu() else f"{properties.major}.{properties.minor}",
        "cudnn": torch.backends.cudnn.version(),
        "driver": nvml(lambda library, _: library.nvmlSystemGetDriverVersion()),
    }


def nvml(question: Callable[[Any, Any], Any]) -> Any:
    """`question(pynvml, handle of the first visible GPU)`, or None where the driver's library cannot be asked.

    Nor is it asked where PyTorch is made for AMD: it would answer for another card, beside the one that computes.
    """
    import torch

    if torch.version.hip is not None:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        if visible.startswith(("GPU-", "MIG-")):
            handle = pynvml.nvmlDeviceGetHandleByUUID(visible)
        else:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)
        answer = question(pynvml, handle)
        return answer.decode() if isinstance(answer, bytes) else answer
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def amd_gpu() -> Any:
    """What PyTorch made for ROCm says of the first visible GPU; None where it is made for others, or sees none."""
    import torch

    return torch.cuda.get_device_properties(0) if torch.version.hip is not None and torch.cuda.is_available() else None


def free_gpu_bytes() -> int | None:
    """Free memory of the first visible GPU, asked of the driver: no CUDA context is made for it. Of AMD's by amdsmi."""
    if (amd := amd_gpu()) is not None:
        import torch

        try:
            return int(amd.total_memory) - torch.cuda.device_memory_used(0)
        except (AttributeError, ImportError, RuntimeError):  # PyTorch before 2.8, no amdsmi, a driver that does not answer
            return None
    answer = nvml(lambda library, handle: library.nvmlDeviceGetMemoryInfo(handle).free)
    return None if answer is None else int(answer)


def total_gpu_bytes() -> int | None:
    """Memory of the first visible GPU, asked of the driver in the same way."""
    if (amd := amd_gpu()) is not None:
        return int(amd.total_memory)
    answer = nvml(lambda library, handle: library.nvmlDeviceGetMemoryInfo(handle).total)
    return None if answer is None else int(answer)


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, "-dirty" if its sources differ; None for an installed copy."""
    package = Path(phase1.__file__).resolve().parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:  # some other project's repository
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    return commit if not commit or not changes else f"{commit}-dirty"


def _git(folder: Path, *args: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def package_version(name: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """The processor's name as the system prints it."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def ram_bytes() -> int | None:
    """Memory of the machine."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)


def free_ram_bytes() -> int | None:
    """Memory that programs can still get without swapping."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def program_again() -> str:
    """What starts a command of this package on as many processes as this one has."""
    if world.size() == 1:
        return "phase1"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size()))
    nodes = f"--nnodes={world.size() // here} " if world.size() > here else ""
    return f"torchrun {nodes}--nproc-per-node={here} -m phase1"


def current_command() -> str:
    """The command line of this process, fit to be typed again: a script with its folder, nothing private in it."""
    path = Path(sys.argv[0])
    program = "phase1" if path.name == "__main__.py" else path.name
    if program.endswith(".py"):
        folder = path.absolute().parent.name
        program = f"python {folder}/{program}" if folder in ("scripts", "benchmarks") else f"python {program}"
    if world.size() > 1:
        program = program_again()
    return " ".join([program, *(shlex.quote(without_private(argument)) for argument in sys.argv[1:])])


def settings(run: Config) -> dict[str, Any]:
    """Every setting of a run, as it goes into a report: nothing private in a text, and not whether it was resumed."""
    return {name: _public(value) for name, value in asdict(run).items() if name != "resume"}


def deciding_settings(run: Config) -> dict[str, Any]:
    """The settings that a number of a report depends on: all but those declared with `affects_results=False`."""
    deciding = {setting.name for setting in fields(run) if setting.metadata.get("affects_results", True)}
    return {name: value for name, value in settings(run).items() if name in deciding}


def _public(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_public, value))
    return without_private(value) if isinstance(value, str) else value
