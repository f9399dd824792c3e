"""benchmarks/scaling.py at a tiny size on the CPU: it runs, and what two ranks find is what one finds. Its speeds need GPUs."""

import json

from tests.parallel.test_ranks import ROOT, started


def test_two_ranks_take_the_losses_of_one(tmp_path):
    done = started(ROOT / "benchmarks" / "scaling.py", "--parts", "steps", "--smoke", "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert (record["world_size"], record["backend"], record["losses_equal_on_all_ranks"]) == (2, "gloo", True)
    assert record["difference_one_to_itself"] == 0 and record["difference_together_to_one"] < 1e-4
    assert min(record["speedup"], record["communication_ms"]) > 0
