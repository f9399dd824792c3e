"""Makes Triton's autotuner compile all forms of a kernel side by side before it times them: one by one that takes minutes.

    python benchmarks/tune_together.py COMMAND [FLAG ...]

runs `phase1 COMMAND` so. For kernels of other libraries that are tuned at their first use; this package's have one form each.
"""

import sys
from contextlib import suppress
from typing import Any

from phase1.ops.compile_together import compiles_side_by_side, side_by_side


def tune_together() -> None:
    """For the rest of this process; nothing changes with a Triton that compiles one kernel at a time."""
    from triton.runtime.autotuner import Autotuner

    usual = Autotuner.prune_configs
    if not compiles_side_by_side():
        return

    def prune_configs(tuner: Any, meta: dict[str, Any]) -> Any:
        """The forms that will be timed, compiled; one that does not compile is left to the tuner."""
        configs = usual(tuner, meta)
        arguments = list(tuner.nargs.values())
        with suppress(Exception), side_by_side():
            for config in configs:
                with suppress(Exception):
                    tuner.fn.run(*arguments, **meta | config.all_kwargs() | {"warmup": True})
        return configs

    Autotuner.prune_configs = prune_configs


if __name__ == "__main__":
    from phase1.cli import main

    tune_together()
    sys.exit(main(sys.argv[1:]))
