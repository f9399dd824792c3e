"""The estimate is of what runs on the card, whatever is installed where it is made."""

import subprocess
import sys

CODE = """
import importlib.util, sys
if {hidden}:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
    sys.modules["triton"] = None
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.roster import model_config
from phase1.runs import MemoryRun
shape = MemoryRun(vocab_size=300, d_model=64, n_layers=2, n_heads=2, ar_ssm_max_rank=16, htt_dense_rows=16, htt_groups=16, htt_rank=2)
peaks = estimate_memory(MemoryCase(model_config("phase1", shape, recompute="none"), 2, 256))
print(peaks.peak_allocated_bytes, peaks.needed_bytes)
"""


def test_a_machine_without_triton_estimates_the_kernels_that_a_card_runs():
    estimates = [
        subprocess.run([sys.executable, "-c", CODE.format(hidden=hidden)], capture_output=True, text=True, check=True).stdout
        for hidden in (True, False)
    ]
    assert estimates[0] == estimates[1] and estimates[0].strip()
