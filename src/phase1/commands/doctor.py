"""`phase1 doctor`: the block that belongs in a bug report."""

import json
from datetime import UTC, datetime
from pathlib import Path

from phase1.device import device_type, unused_accelerator
from phase1.files import atomic_write
from phase1.machine.environment import environment, free_gpu_bytes, free_ram_bytes, package_version
from phase1.machine.probe import cuda_status, rocm_version, triton_status
from phase1.runs import DoctorRun
from phase1.training.step import precision

PACKAGES = ("numpy", "scipy", "pydantic", "safetensors", "tokenizers", "datasets", "matplotlib", "tqdm")


def main(run: DoctorRun) -> int:
    """Print facts of software, hardware and free memory, as text that can be pasted, and write them; the exit status is 0."""
    facts = dict(environment())
    facts |= {name: package_version(name) for name in PACKAGES}
    facts |= {"free_ram_bytes": free_ram_bytes(), "free_gpu_bytes": free_gpu_bytes()}
    facts |= {"hip": rocm_version(), "not_used": unused_accelerator(), "precision": precision("auto", device_type())}
    facts |= {"cuda_works": cuda_status(), "triton_works": triton_status()}
    if run.submit_file is not None:
        dated = {"created_utc": datetime.now(UTC).isoformat(timespec="seconds")} | facts
        atomic_write(Path(run.submit_file), (json.dumps(dated, indent=1) + "\n").encode())
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {_text(name, value)}" for name, value in facts.items()))
    if facts["not_used"]:
        print(f"\nan accelerator is there and is not used ({facts['not_used']}): phase1 runs on GPUs of NVIDIA and on the CPU")
    print(f"\nnext  {next_step(str(facts['cuda_works']))}")
    return 0


def next_step(cuda: str) -> str:
    """What this machine can do."""
    if cuda == "works":
        return "phase1 memory --fit   what trains on this GPU; then phase1 throughput, phase1 pipeline"
    return 'phase1 memory --card "RTX 3060" --fit   estimated without a GPU; phase1 pipeline --preset smoke runs on a CPU'


def _text(name: str, value: object) -> str:
    if isinstance(value, int) and name.endswith("_bytes"):
        return f"{value} ({value / 1e9:.2f} GB, {value / 2**30:.2f} GiB)"
    return "-" if value is None else str(value)
