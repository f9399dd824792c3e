"""The kernels fit cards that are not here: compiled ahead for Ampere, Ada and Hopper."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from phase1.ops.compile_together import compiles_side_by_side

one_by_one = pytest.mark.skipif(not compiles_side_by_side(), reason="this Triton compiles one kernel at a time")
KIB = 1024
MOST = {86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB}  # shared memory of a program, CUDA C++ Programming Guide, table 30
DEFAULT = "R 32, P 64, FP16"
USUAL = (DEFAULT, "R 128, P 128, FP32", "other operators, FP16")  # ranks of 128 in FP16: the same blocks, of half the bytes
MORE = [(86, ("R 128, P 128, FP16",)), (89, (DEFAULT,)), (90, (DEFAULT,))]
CASES = [(86, USUAL)] + (MORE if os.environ.get("PHASE1_TORTURE") else [])


@pytest.mark.parametrize("capability, cases", CASES)
def test_every_kernel_compiles_within_the_shared_memory_of_the_card(capability, cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("ahead.py")
    done = subprocess.run([sys.executable, script, str(capability), *cases], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len({name for name, _, _ in kernels}) >= (24 if cases == USUAL else 16)
    too_large = [(name, int(shared), sizes) for name, shared, sizes in kernels if int(shared) > MOST[capability]]
    assert not too_large


@one_by_one
def test_kernels_that_are_compiled_together_are_all_that_will_run():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("together.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    together, later, launches = map(int, done.stdout.split())
    assert 20 <= together < launches and later == 0


@one_by_one
def test_forms_of_a_tuned_kernel_are_compiled_before_they_are_timed():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("tuned.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.split() == ["0"] * 3, done.stderr[-2000:] + done.stdout
