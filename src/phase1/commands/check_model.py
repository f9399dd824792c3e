"""`phase1 check-model`: whether a model of the user's own may be measured, and if not, what to correct."""

from phase1.config import ModelConfig
from phase1.device import device_type
from phase1.factory import WrongReference, pinned, split
from phase1.measure.soundness.causality import causal_up_to
from phase1.measure.soundness.check import check_model
from phase1.records.schema import Check, exit_code
from phase1.roster import OWN
from phase1.runs import CheckModelRun


def main(run: CheckModelRun) -> int:
    """Print every check as it ends; the exit status is that of all checks."""
    name, reference = split(run.own_model)
    device = device_type()
    ranks = {"ar_ssm_max_rank": min(8, run.d_model), "ar_ssm_min_rank": 1, "htt_rank": 1, "ar_ssm_window": 16}
    sizes = {"vocab_size": run.vocab_size, "d_model": run.d_model, "n_layers": run.n_layers, "n_heads": run.n_heads}
    try:
        model = pinned(reference)
    except WrongReference:
        raise
    except ValueError as error:  # a package around the module
        failed_first = Check(name="builds", value=None, limit=None, status="fail", detail=str(error))
        print(line(failed_first, run.verbose), _no(1, 1), sep="\n")
        return 1
    config = ModelConfig(**(OWN | ranks | sizes | {"model": model}))
    print(f"check-model: may {name} ({config.model}) be measured?  {device}, T = {run.seq_length}", flush=True)
    checks: list[Check] = []
    for check in check_model(config, run.seq_length, device):
        checks.append(check)
        print(line(check, run.verbose), flush=True)
    failed = sum(check.status == "fail" for check in checks)
    if failed:
        print(_no(failed, len(checks)))
        return 1
    print(f"answer  yes: causal up to T = {causal_up_to(checks) or run.seq_length:,}")
    model = f"{name}={reference.partition('@')[0]}"
    print(f"next    phase1 perplexity --preset smoke --model {model}   small, beside engine and Transformer")
    return exit_code(check for check in checks if check.status != "inconclusive")


def _no(failed: int, checks: int) -> str:
    return f"answer  no: {failed} of {checks} checks fail; a number of this model would mean nothing"


def line(check: Check, verbose: bool) -> str:
    """One check on one line; its numbers where it is not passed."""
    status = {"pass": "PASS", "fail": "FAIL", "inconclusive": "-"}[check.status]
    plain = check.status == "fail" or check.limit is None or check.value is None  # one that fails says what it got
    limit = "" if plain else f"{check.value:.3g} of {check.limit:g}: "
    shown = verbose or check.status != "pass" or check.name == "builds"
    return f"{status:<5} {check.name:<24} {limit}{check.detail}" if shown else f"{status:<5} {check.name}"
